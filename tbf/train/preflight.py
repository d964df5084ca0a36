"""Memory before and while a run goes on: plans it, refuses what cannot fit, and explains an end for want of memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import psutil
import torch

from tbf.checkpoints import ranks
from tbf.config import RunConfig
from tbf.errors import HardwareError
from tbf.hardware.devices import CONTEXT_BYTES, CPU, Device, recognise
from tbf.planning.plan import Machine, MemoryPlan, Planner
from tbf.planning.relief import reliefs
from tbf.system import host_memory
from tbf.train.ds_config import EngineConfig
from tbf.train.environment import ProcessInfo

log = logging.getLogger("tbf")

FITS, HOPELESS = 0.5, 4.0
"""An estimate below or above these shares of what is free settles the matter; in between the model is traced."""
CLOSE = 0.9
"""Share of what is free above which a run is warned."""
_OUT_OF_MEMORY = re.compile(r"out of memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|not enough memory", re.I)
_ASKED = re.compile(r"tried to allocate ([\d.,]+\s*\w+)", re.I)


@dataclass(frozen=True)
class Room:
    """Bytes that a rank could take at the start: of its card (0: it has none), and of its node's memory."""

    card: float
    host: float


class Preflight:
    """What this run needs of this machine, as planned."""

    def __init__(self, run: RunConfig, engine_config: EngineConfig, process: ProcessInfo, device: torch.device) -> None:
        self.run, self.process, self.device = run, process, device
        self.engine = engine_config.as_planned()
        self.memory: MemoryPlan | None = None
        self._planner: Planner | None = None

    def check(self, say: Callable[[str], None], *, ignore: bool = False) -> None:
        """Plans the run on rank 0, for the rank with the least room. Collective.

        Raises HardwareError on every rank when it cannot fit; with `ignore`, says so and lets it start.
        """
        rooms = ranks.gather(self._room())
        room = Room(min(room.card for room in rooms), min(room.host for room in rooms))
        nodes = max(1, self.process.world_size // self.process.local_world_size)
        machine = Machine(self._card(room), self.process.local_world_size, nodes, room.host)
        self._planner = Planner(machine, say=lambda text: None)
        self.memory, problem = ranks.on_rank_0(lambda: self._judge(say))
        if problem and not ignore:
            raise HardwareError(f"{problem} To start all the same: --ignore-plan")
        if problem:
            say(f"WARNING: {problem}")

    def _judge(self, say: Callable[[str], None]) -> tuple[MemoryPlan, str]:
        """(the plan, what does not fit)."""
        plan = self._planner.estimate(self.run, self.engine)
        most = max(verdict.needed / max(verdict.available, 1) for verdict in plan.verdicts)
        settled = not FITS < most < HOPELESS
        if not settled:
            plan = self._planner.memory(self.run, self.engine)
        source = plan.activations.source
        settled = settled or source == "traced"
        amounts = [f"{v.needed / 1e9:.2f} GB of {v.resource}, {v.available / 1e9:.2f} free" for v in plan.verdicts]
        say(f"plan ({source}): {'; '.join(amounts)}")
        short = next((verdict for verdict in plan.verdicts if not verdict.fits), None)
        if short is None or not settled:  # an estimate alone refuses nothing
            for verdict in plan.verdicts:
                if verdict.needed > CLOSE * verdict.available:
                    say(f"WARNING: {verdict.resource} will be short or suffice by little")
            return plan, ""
        where = "a node" if short.resource == "host memory" else "a card"
        return plan, (
            f"{self.run.preset} needs {short.needed / 1e9:.2f} GB of {short.resource}, and {where} has "
            f"{short.available / 1e9:.2f} GB free ({_largest(plan, short.resource)}). {self._advice(short.resource)}"
        )

    def _room(self) -> Room:
        """What this process holds already is part of the plan, so it counts as free."""
        _, free = host_memory()
        host = free + self.process.local_world_size * psutil.Process().memory_full_info().uss
        if self.device.type != "cuda":
            return Room(0.0, host)
        return Room(torch.cuda.mem_get_info(self.device)[0] + CONTEXT_BYTES, host)

    def _card(self, room: Room) -> Device:
        """This rank's card with the memory that is free; one that the table lacks serves as well, but for its speed."""
        if self.device.type != "cuda":
            return CPU
        name, capability = torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device)
        backend = "cuda_dp4a" if capability >= (6, 1) else "fp32"
        unknown = Device("card", name, room.card, 1.0, 1.0, backend, 1.0, 1.0, capability)
        return replace(recognise(name, room.card) or unknown, memory=room.card)

    def _advice(self, resource: str) -> str:
        found = reliefs(self._planner, self.run, self.engine, resource)
        listed = "; ".join(f"({number}) {relief}" for number, relief in enumerate(found, 1))
        return f"What helps, by an estimate: {listed}." if listed else "Take a smaller model or a larger machine."

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns an end for want of memory into HardwareError: what was asked for, what was planned, what to change."""
        try:
            yield
        except (RuntimeError, MemoryError, OSError) as error:  # torch.OutOfMemoryError is a RuntimeError
            resource = _exhausted(error)
            if resource is None or self.memory is None:
                raise
            raise HardwareError(self._explanation(error, resource)) from error

    def _explanation(self, error: BaseException, resource: str) -> str:
        planned = {verdict.resource: verdict for verdict in self.memory.verdicts}
        resource = resource if resource in planned else "host memory"
        verdict, source = planned[resource], self.memory.activations.source
        return (
            f"rank {self.process.rank} ran out of {resource}: {_asked(error)}, {self._free_now(resource)}. "
            f"The plan ({source}) counted {verdict.needed / 1e9:.2f} GB{_share(resource, self.process)}, of "
            f"{verdict.available / 1e9:.2f} free at the start ({_largest(self.memory, resource)}). "
            f"{self._advice(resource)}"
        )

    def _free_now(self, resource: str) -> str:
        try:
            if resource == "GPU memory":
                free, total = torch.cuda.mem_get_info(self.device)
            else:
                total, free = host_memory()
        except RuntimeError:  # a card that has failed answers nothing
            return "how much is free can't be asked any more"
        return f"{free / 1e9:.2f} of {total / 1e9:.2f} GB are free now"


def _share(resource: str, process: ProcessInfo) -> str:
    several = resource == "host memory" and process.local_world_size > 1
    return f" for the {process.local_world_size} ranks of a node" if several else ""


def _exhausted(error: BaseException) -> str | None:
    """The resource that an error says is used up, or None where it says something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU memory"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host memory"
    if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):
        return "GPU memory" if "CU" in str(error) and "DefaultCPUAllocator" not in str(error) else "host memory"
    return None


def _asked(error: BaseException) -> str:
    """How much the failed allocation wanted, as the error has it."""
    match = _ASKED.search(str(error))
    if match is None:
        return "an allocation of unknown size failed"
    amount = match.group(1)
    count, _, unit = amount.partition(" ")
    return f"{int(count) / 1e9:.2f} GB were asked for" if unit == "bytes" else f"{amount} were asked for"


def _largest(plan: MemoryPlan, resource: str, count: int = 3) -> str:
    """The largest parts of a rank's plan."""
    parts = dict(plan.beside) if resource == "host memory" else {}
    for item in plan.items:
        if item.when not in ("start", "handed"):
            parts[item.name] = parts.get(item.name, 0) + item.bytes
    pass_ = plan.activations
    parts[f"activations, most at {pass_.peak_at}"] = pass_.own
    largest = sorted(parts.items(), key=lambda part: -part[1])[:count]
    return "for each rank " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest) + " GB"
