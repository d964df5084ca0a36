"""A run on a machine: memory, disk, traffic and time, and whether it fits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tbf.config import RunConfig
from tbf.hardware.cpu_rates import CpuRates, cpu_rates, shared
from tbf.hardware.devices import CONTEXT_BYTES, Device
from tbf.model.config import UltraConfig
from tbf.model.flops import build_meta, parameters_by_part, training_flops_per_token
from tbf.ops.ternary_backends import TernaryPlan
from tbf.ops.ternary_probe import default_plan
from tbf.planning.activations import Activations, activations, replay
from tbf.planning.calibration import pass_factor
from tbf.planning.engine_state import FLOAT, Engine, Item, ModelFacts, Reduction, engine_items, model_facts, reduction
from tbf.planning.estimate import estimate_pieces
from tbf.planning.timing import ETHERNET_SHARE, StepTime, step_time
from tbf.planning.traffic import Traffic, step_traffic
from tbf.planning.visits import PieceTracer, Shape

PROCESS_BYTES = int(0.5e9)
"""Resident memory of Python, torch and DeepSpeed in one rank."""
WORKER_BYTES = int(0.3e9)
"""Of a process that prepares data."""
FRAGMENTATION = 0.10
"""Of the activations, added: what an allocator loses between blocks of different sizes."""
HEAP_KEPT, HEAP_PASSING = 0.7, 2.0
"""The same where the processor trains, as measured, of activations that are kept for the backward and of those that
come and go: glibc hands out tensors of all sizes from one heap."""
CHECKPOINT_WEIGHTS, CHECKPOINT_STATE = 4, 12
"""Bytes per parameter of a saved checkpoint: the model's file (ZeRO-1 and 2), and the optimizer's shards."""
TOKEN_BYTES = 2
GIGABIT = 125e6


@dataclass(frozen=True)
class Machine:
    """What a run may use."""

    device: Device
    gpus: int = 1
    """Ranks on each node."""
    nodes: int = 1
    host_memory: float = 128e9
    """Bytes, per node."""
    disk: float | None = None
    """Free bytes for checkpoints and data; None: not known."""
    network: float = 10 * GIGABIT
    """Bytes per second between nodes, nominal."""
    latency: float = 1e-4
    """Seconds that a message takes between nodes."""
    threads: int = 1
    """Of each rank; matters on the CPU only."""

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Verdict:
    """One resource: bytes needed against bytes there are."""

    resource: str
    needed: float
    available: float
    cure: str = ""

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


@dataclass(frozen=True)
class MemoryPlan:
    """What a rank holds, and whether the machine has it."""

    items: list[Item]
    activations: Activations
    beside: dict[str, int]
    verdicts: list[Verdict]

    @property
    def fits(self) -> bool:
        return all(verdict.fits for verdict in self.verdicts)


@dataclass(frozen=True)
class Plan:
    """What `tbf plan` shows. Bytes per rank, unless the name says otherwise; seconds per optimizer step."""

    preset: str
    machine: Machine
    engine: Engine
    shape: Shape
    parameters: dict[str, int]
    facts: ModelFacts = field(repr=False)
    items: list[Item] = field(repr=False)
    activations: Activations = field(repr=False)
    beside: dict[str, int]
    """In host memory too, by name: what is neither the engine's nor activations."""
    traffic: Traffic
    time: StepTime
    flops_per_token: float
    checkpoint_bytes: int
    """One checkpoint, all ranks together."""
    disk_bytes: int
    """Checkpoints that exist at once, and the data."""
    verdicts: list[Verdict]

    @property
    def fits(self) -> bool:
        return all(verdict.fits for verdict in self.verdicts)

    @property
    def tokens_per_step(self) -> int:
        return self.shape.rows * self.shape.tokens * self.engine.accumulation * self.machine.ranks

    @property
    def tokens_per_day(self) -> float:
        return 86_400 * self.tokens_per_step / self.time.total

    def to_dict(self) -> dict[str, Any]:
        acts = {k: v for k, v in vars(self.activations).items() if k not in ("forward", "backward")}
        return {
            "preset": self.preset,
            "fits": self.fits,
            "machine": asdict(self.machine),
            "engine": asdict(self.engine),
            "shape": asdict(self.shape),
            "parameters": self.parameters,
            "state": [asdict(item) for item in self.items],
            "activations": acts,
            "beside": self.beside,
            "memory": memory_by_place(self.items, self.activations, self.machine.device.on_cuda),
            "traffic": asdict(self.traffic),
            "step_seconds": {**asdict(self.time), "total": self.time.total},
            "flops_per_token": self.flops_per_token,
            "tokens_per_day": self.tokens_per_day,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "verdicts": [{**asdict(verdict), "fits": verdict.fits} for verdict in self.verdicts],
        }


class Planner:
    """Plans runs on one machine, tracing each shape of a model once."""

    def __init__(self, machine: Machine, *, say: Callable[[str], None] = lambda text: None) -> None:
        self.machine = machine
        self._tracer = PieceTracer(machine.device.on_cuda, say)
        self._known: dict[tuple, Any] = {}

    @functools.cached_property
    def _all_rates(self) -> CpuRates:
        """Of all ranks of a node together."""
        return cpu_rates(self.machine.threads * self.machine.gpus)

    @functools.cached_property
    def rates(self) -> CpuRates | None:
        """Of one rank, where the processor trains."""
        return None if self.machine.device.on_cuda else shared(self._all_rates, self.machine.gpus)

    @functools.cached_property
    def slowdown(self) -> float:
        """Of operators without products in a pass against one by one; the datasheets' shares hold it for cards."""
        return 1.0 if self.machine.device.on_cuda else pass_factor(self._all_rates)

    def estimate(self, run: RunConfig, engine: Engine) -> MemoryPlan:
        """Memory without a trace: in milliseconds, and rough."""
        config, shape = run.model, largest_shape(run)
        pieces = estimate_pieces(config, shape, checkpointed=engine.granularity != "none")
        items = self._items(run, engine)
        options = {"host_offload": engine.cpu_checkpointing, "gradients_stay": _gradients_stay(engine),
                   "reduction": reduction(items, engine)}  # fmt: skip
        pass_ = replay(config, pieces, engine.granularity, loops=most_loops(run), **options)
        return self._memory(run, engine, items, replace(pass_, source="estimated"))

    def memory(self, run: RunConfig, engine: Engine) -> MemoryPlan:
        """Memory as `plan` has it, without what only time depends on."""
        items = self._items(run, engine)
        options = (engine.granularity, most_loops(run), engine.cpu_checkpointing, _gradients_stay(engine),
                   reduction(items, engine))  # fmt: skip
        pass_ = self._once(self._activations, run.model, largest_shape(run), *options)
        return self._memory(run, engine, items, pass_)

    def plan(self, run: RunConfig, engine: Engine) -> Plan:
        """Works out the plan of a run whose train section agrees with `engine`."""
        machine, config, shape, loops = self.machine, run.model, largest_shape(run), most_loops(run)
        facts = self._once(_facts, config, engine.persistence)
        memory = self.memory(run, engine)
        pass_ = memory.activations
        traffic = step_traffic(facts, engine, machine.ranks, loops, pass_.host, machine.device.on_cuda)
        seconds = step_time(
            pass_, facts, engine, traffic, device=machine.device, rates=self.rates, slowdown=self.slowdown,
            ranks=machine.ranks, local_ranks=machine.gpus, network=self._network(),
        )  # fmt: skip
        per_parameter = CHECKPOINT_STATE + (CHECKPOINT_WEIGHTS if engine.stage < 3 else 0)
        checkpoint = per_parameter * facts.total
        kept = run.train.keep_last + run.train.keep_best + 1
        tokens = run.train.max_steps * shape.rows * shape.tokens * engine.accumulation * machine.ranks
        data = min(TOKEN_BYTES * tokens, int(run.data.disk_budget_gb * 1e9))
        parts = self._once(parameters_by_part, config)
        flops = self._once(training_flops_per_token, config, shape.tokens, shape.slots / shape.tokens)
        plan = Plan(
            run.preset, machine, engine, shape, parts, facts, memory.items, pass_, memory.beside, traffic,
            seconds, flops, checkpoint, kept * checkpoint + data, [],
        )  # fmt: skip
        verdicts = list(memory.verdicts)
        if machine.disk is not None:
            swapped = machine.gpus * sum(item.bytes for item in memory.items if item.place == "nvme")
            verdicts.append(Verdict("disk", plan.disk_bytes + swapped, machine.disk))
        return replace(plan, verdicts=verdicts)

    def _memory(self, run: RunConfig, engine: Engine, items: list[Item], pass_: Activations) -> MemoryPlan:
        machine = self.machine
        facts = self._once(_facts, run.model, engine.persistence)
        memory = memory_by_place(items, pass_, machine.device.on_cuda)
        beside = {
            "Python, torch and DeepSpeed": PROCESS_BYTES,
            "workers of the loader": run.data.num_workers * WORKER_BYTES,
            # glibc is told to keep freed memory
            "weights of the model as built, freed": FLOAT * facts.total,
            "gaps in the heap": 0 if machine.device.on_cuda else heap_gaps(pass_),
        }
        host = machine.gpus * (memory["host"] + sum(beside.values()))
        verdicts = [Verdict("host memory", host, machine.host_memory)]
        if machine.device.on_cuda:
            verdicts.insert(0, Verdict("GPU memory", memory["device"], machine.device.memory))
        return MemoryPlan(items, pass_, beside, verdicts)

    def _items(self, run: RunConfig, engine: Engine) -> list[Item]:
        facts = self._once(_facts, run.model, engine.persistence)
        return engine_items(facts, engine, self.machine.ranks, self.machine.device.on_cuda)

    def _network(self) -> tuple[float, float]:
        """Bytes per second and latency. Between nodes the network decides; between the cards of one, PCIe, over which
        both directions share."""
        if self.machine.nodes > 1:
            return self.machine.network * ETHERNET_SHARE, self.machine.latency
        return (self.machine.device.pcie / 2 if self.machine.device.on_cuda else self.rates.adam / 4), 0.0

    def _activations(
        self,
        config: UltraConfig,
        shape: Shape,
        granularity: str,
        loops: int,
        on_host: bool,
        stay: bool,
        handing: Reduction,
    ) -> Activations:
        return activations(
            self._tracer, config, shape, self._ternary_plan(), granularity,
            loops=loops, host_offload=on_host, gradients_stay=stay, reduction=handing,
        )  # fmt: skip

    def _ternary_plan(self) -> TernaryPlan:
        if self.machine.device.on_cuda:
            backend = self.machine.device.int8_backend
            return TernaryPlan(backend, backend)
        return default_plan(torch.device("cpu"))

    def _once(self, function: Callable, *arguments: Any) -> Any:
        """`function(*arguments)`, from memory if it was asked before: a search plans the same model many times."""
        key = (function.__name__, *arguments)
        if key not in self._known:
            self._known[key] = function(*arguments)
        return self._known[key]


def largest_shape(run: RunConfig) -> Shape:
    """Of any batch of the run."""
    rate = max(run.data.mask_rate, run.data.mask_rate_end)
    return Shape(run.train.micro_batch_size, run.data.seq_len, max(1, round(rate * run.data.seq_len)))


def most_loops(run: RunConfig) -> int:
    """Of any step of the run."""
    return run.model.num_loops + (1 if run.train.stochastic_loops else 0)


def _gradients_stay(engine: Engine) -> bool:
    return engine.stage == 1 and engine.accumulation == 1


def _facts(config: UltraConfig, persistence: int) -> ModelFacts:
    return model_facts(build_meta(config), persistence)


def heap_gaps(pass_: Activations) -> int:
    """Bytes that lie unused between the activations in glibc's heap."""
    kept = min(pass_.kept, pass_.own)
    return int(HEAP_KEPT * kept + HEAP_PASSING * (pass_.own - kept))


def memory_by_place(items: list[Item], pass_: Activations, on_cuda: bool) -> dict[str, int]:
    """The most bytes that each place must hold at once. On the CPU, `host` holds what the device would."""
    totals: Counter[tuple[str, str]] = Counter()
    for item in items:
        place = "host" if item.place == "device" and not on_cuda else item.place
        totals[place, item.when] += item.bytes
    during = {"device": pass_.peak + int(FRAGMENTATION * pass_.own), "host": pass_.host}
    always = {"device": pass_.ternary_caches + CONTEXT_BYTES, "host": 0}
    if not on_cuda:
        during = {"device": 0, "host": pass_.peak + pass_.host}
        always = {"device": 0, "host": pass_.ternary_caches}
    peaks = {}
    for place in ("device", "host"):
        held = totals[place, "always"] + always[place]
        moments = (totals[place, "pass"] + during[place], totals[place, "reduce"], totals[place, "step"])
        peaks[place] = max(held + max(moments), totals[place, "start"])
    return {**peaks, "nvme": totals["nvme", "always"]}
