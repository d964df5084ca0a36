"""What DeepSpeed's ZeRO allocates in FP32 beside the activations, tensor by tensor.

Read off DeepSpeed 0.19.8 and checked against a census of a live engine's tensors (tests/planning). Its own estimators
assume 16-bit weights and are off by two here. Bytes for P parameters and N data-parallel ranks, per rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tbf.errors import ConfigError

FLOAT = 4
_DEFAULT_BUCKET = 500_000_000
_DEFAULT_SUBGROUP, _DEFAULT_LIVE, _DEFAULT_PREFETCH, _DEFAULT_PERSISTENT = 10**9, 10**9, 5 * 10**7, 10**5
_REDUCTION_BUCKET = "reduction bucket"
_NORM = "largest gradient in FP64, for its norm"
_SCATTERED = "gradients being scattered"
_PARAM_BUFFERS, _PARAM_BUFFER_SIZE, _OPTIMIZER_BUFFERS, _MAX_IN_CPU = 5, 10**8, 4, 10**9


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model's parameters, in elements."""

    total: int
    largest: int
    largest_module: int
    """Of one layer, which ZeRO-3 gathers as a whole at least part by part."""
    small: int
    """Elements of parameters below ZeRO-3's persistence threshold."""
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """What the planner reads from a resolved ds_config."""

    stage: int
    offload_optimizer: str = "none"
    """none, cpu or nvme."""
    offload_param: str = "none"
    torch_adam: bool = False
    pin_optimizer: bool = True
    pin_param: bool = True
    reduce_bucket: int = _DEFAULT_BUCKET
    overlap_comm: bool = False
    accumulation: int = 1
    granularity: str = "none"
    cpu_checkpointing: bool = False
    sub_group: int = _DEFAULT_SUBGROUP
    prefetch: int = _DEFAULT_PREFETCH
    max_live: int = _DEFAULT_LIVE
    persistence: int = _DEFAULT_PERSISTENT
    param_buffers: int = _PARAM_BUFFERS
    param_buffer_size: int = _PARAM_BUFFER_SIZE
    max_in_cpu: int = _MAX_IN_CPU
    """Weights that stay in host memory when the others are on NVMe, elements."""
    optimizer_buffers: int = _OPTIMIZER_BUFFERS
    pipelined: bool = False
    """Whether the optimizer reads or writes one group on NVMe while it updates another."""
    nvme_path: str = ""
    stage_keys: tuple[str, ...] = ()
    """Of zero_optimization, what the ds_config states and would have to lose on the other side of stage 3."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], granularity: str, cpu_checkpointing: bool) -> Engine:
        """Reads a resolved ds_config. Raises ConfigError for options that contradict each other."""
        zero = config.get("zero_optimization", {})
        optimizer, param = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
        stage = zero.get("stage", 0)
        engine = cls(
            stage=stage,
            offload_optimizer=optimizer.get("device", "none"),
            offload_param=param.get("device", "none"),
            torch_adam=bool(config.get("optimizer", {}).get("params", {}).get("torch_adam", False)),
            pin_optimizer=bool(optimizer.get("pin_memory", True)),
            pin_param=bool(param.get("pin_memory", True)),
            reduce_bucket=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET)),
            overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
            accumulation=int(config.get("gradient_accumulation_steps", 1)),
            granularity=granularity,
            cpu_checkpointing=cpu_checkpointing,
            sub_group=int(zero.get("sub_group_size", _DEFAULT_SUBGROUP)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", _DEFAULT_PREFETCH)),
            max_live=int(zero.get("stage3_max_live_parameters", _DEFAULT_LIVE)),
            persistence=int(zero.get("stage3_param_persistence_threshold", _DEFAULT_PERSISTENT)),
            param_buffers=int(param.get("buffer_count", _PARAM_BUFFERS)),
            param_buffer_size=int(param.get("buffer_size", _PARAM_BUFFER_SIZE)),
            max_in_cpu=int(param.get("max_in_cpu", _MAX_IN_CPU)),
            optimizer_buffers=int(optimizer.get("buffer_count", _OPTIMIZER_BUFFERS)),
            pipelined=bool(optimizer.get("pipeline_read") or optimizer.get("pipeline_write")),
            nvme_path=str(optimizer.get("nvme_path") or param.get("nvme_path") or ""),
        )
        if engine.offload_param != "none" and stage != 3:
            raise ConfigError(
                f"zero_optimization.offload_param is '{engine.offload_param}' under stage {stage}; only stage 3 can "
                "offload parameters: set stage to 3, or remove offload_param"
            )
        if engine.offload_optimizer == "nvme" and stage != 3:
            raise ConfigError(
                f"zero_optimization.offload_optimizer.device is 'nvme' under stage {stage}; use stage 3, or 'cpu'"
            )
        return engine


@dataclass(frozen=True)
class Reduction:
    """What a pass needs while its gradients are handed to the engine. Bytes."""

    bucket: int = 0
    """Complete gradients that start a reduction."""
    fills: int = 0
    """The most of the bucket that takes memory only as it fills."""
    moment: int = 0
    """While each reduction is under way."""
    collected: int = 0
    """Gradients that lie by then in a bucket of the engine's own, which is there from the start, and wait no longer."""


@dataclass(frozen=True)
class Item:
    """One thing that the engine holds: on the `device`, in `host` memory or on `nvme`; when: `always`, in a forward and
    backward `pass`, at most and as its gradients are `handed` over one by one, while they are `reduce`d after it, in
    the optimizer's `step`, or at the `start` of the run."""

    name: str
    place: str
    bytes: int
    when: str = "always"


def model_facts(model: nn.Module, persistence: int = _DEFAULT_PERSISTENT) -> ModelFacts:
    """Sizes of the parameters of a model, which may be on the meta device."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in getattr(model, "layers", [])]
    small = sum(size for size in sizes if size < persistence)
    return ModelFacts(sum(sizes), max(sizes), max(layers, default=max(sizes)), small, tuple(sizes))


def engine_items(model: ModelFacts, engine: Engine, ranks: int, on_cuda: bool) -> list[Item]:
    """Everything that one of `ranks` ranks holds beside activations."""
    items = _zero3(model, engine, ranks, on_cuda) if engine.stage == 3 else _zero12(model, engine, ranks, on_cuda)
    items.append(Item("model under construction", "host", FLOAT * model.total, "start"))
    return [item for item in items if item.bytes > 0]


def reduction(items: list[Item], engine: Engine) -> Reduction:
    """Of `engine_items`, what comes as gradients are handed over."""
    sizes = {item.name: item.bytes for item in items if item.when == "handed"}
    scattered = sizes.get(_SCATTERED, 0)
    moment = sizes.get(_NORM, 0) + scattered
    return Reduction(FLOAT * engine.reduce_bucket, sizes.get(_REDUCTION_BUCKET, 0), moment, scattered)


def _zero12(model: ModelFacts, engine: Engine, ranks: int, on_cuda: bool) -> list[Item]:
    whole = FLOAT * model.total
    share = whole // ranks
    offload = engine.offload_optimizer != "none"
    pinned = on_cuda and engine.pin_optimizer

    def host(name: str, size: int, when: str = "always") -> Item:
        return Item(name, "host", _pinned(size) if pinned else size, when)

    bucket = _bucket(model, engine, on_cuda)
    once = engine.stage == 1 or model.total <= engine.reduce_bucket  # all is reduced when the activations are gone
    items = [Item("weights", "device", whole)]
    if on_cuda or engine.stage == 2:  # host memory is taken as gradients come in, under ZeRO-1 after the pass
        items.append(Item(_REDUCTION_BUCKET, "device", bucket, "pass" if on_cuda else "handed"))
    if once:
        items.append(Item(_REDUCTION_BUCKET, "device", bucket, "reduce"))
    if engine.stage == 1:
        # Gradients stay in the parameters until the last micro-batch. With one, the pass itself counts them.
        moments = ("pass", "reduce") if engine.accumulation > 1 else ("reduce",)
        items += [Item("gradients of the whole model", "device", whole, when) for when in moments]
    if offload:
        largest = FLOAT * model.largest
        items += [
            host("master weights", share),
            host("updated weights on their way back", share),
            host("gradients", share),
            host("Adam moments", share),
            host("Adam moments", share),
            host("staging of the largest gradient", largest),
            Item("staging of the largest gradient", "device", largest),
            Item(_NORM, "device", 2 * largest, "reduce" if once else "handed"),
        ]
        if engine.stage == 2 and engine.accumulation > 1:
            pieces = [FLOAT * size // ranks for size in model.sizes]
            items.append(Item("accumulated gradients", "host", sum(map(_pinned, pieces)) if pinned else share))
        return items
    copies = 2 if engine.stage == 2 and engine.accumulation > 1 else 1
    items += [
        Item("master weights", "device", share),
        Item("Adam moments", "device", 2 * share),
        Item("this rank's gradients", "device", copies * share, "pass" if engine.stage == 2 else "reduce"),
        Item("this rank's gradients", "device", share, "step"),
        Item("the same in one piece", "device", share, "step"),
        Item("temporaries of Adam", "device", _adam_temporaries(engine, on_cuda) * share, "step"),
    ]
    return items


def _zero3(model: ModelFacts, engine: Engine, ranks: int, on_cuda: bool) -> list[Item]:
    whole = FLOAT * model.total
    share = whole // ranks
    pinned = on_cuda and engine.pin_optimizer
    group = FLOAT * largest_group(model, engine, ranks)

    def host(name: str, size: int, when: str = "always", *, pin: bool = pinned) -> Item:
        return Item(name, "host", _pinned(size) if pin else size, when)

    bucket = _bucket(model, engine, on_cuda)
    once = model.total <= engine.reduce_bucket  # one reduction, when the activations are gone
    items = [
        Item(_REDUCTION_BUCKET, "device", bucket),
        Item(_SCATTERED, "device", FLOAT * _fullest_bucket(model.sizes, engine), "reduce" if once else "handed"),
    ]
    if engine.offload_param == "none":
        items.append(Item("weights (this rank's share)", "device", share))
    elif engine.offload_param == "cpu":
        items.append(host("weights (this rank's share)", share, pin=on_cuda))
    else:
        buffers = FLOAT * engine.param_buffers * engine.param_buffer_size
        kept = min(share, FLOAT * engine.max_in_cpu)
        items += [
            Item("weights", "nvme", share),
            host("buffers for weights on NVMe", buffers, pin=on_cuda),
            host("weights that stay in host memory", kept, pin=on_cuda),
        ]
        if kept < share:
            items.append(host("updated weights on their way to NVMe", group))
    if ranks > 1 or (on_cuda and engine.offload_param != "none"):
        live = min(model.total, max(engine.max_live, model.largest_module)) - (0 if on_cuda else model.small)
        items.append(Item("gathered weights", "device", FLOAT * live, "pass"))
        if model.total > engine.max_live:  # else all of them lie there by the time that needs the most
            items.append(Item("weights being gathered", "device", FLOAT * min(engine.prefetch, model.total), "pass"))
        if ranks > 1 and once:
            items.append(Item("gathered weights", "device", FLOAT * live, "reduce"))
    if engine.offload_optimizer == "none":
        items += [
            Item("master weights", "device", share),
            Item("gradients", "device", share),
            Item("Adam moments", "device", 2 * share),
            Item("gradients of a group", "device", group, "step"),
            Item("temporaries of Adam", "device", _adam_temporaries(engine, on_cuda) * group, "step"),
        ]
    elif engine.offload_optimizer == "cpu":
        names = ("master weights", "gradients for Adam", "gradients", "Adam moments", "Adam moments")
        items += [host(name, share) for name in names]
    else:
        items += [
            host("gradients", share),
            host("buffers for the optimizer on NVMe", engine.optimizer_buffers * group),
            Item("master weights, Adam moments and gradients", "nvme", 4 * share),
        ]
        if engine.pipelined:  # as the first step made them; the second one lets go
            moments = "Adam moments, until the second step"
            items += [host(moments, 2 * share, when) for when in ("pass", "reduce", "step")]
    if engine.offload_optimizer != "none":
        items.append(Item(_NORM, "device", 2 * FLOAT * model.largest // ranks, "reduce" if once else "handed"))
    return items


def sub_groups(sizes: Iterable[int], limit: int, ranks: int) -> Iterator[list[int]]:
    """Cuts parameters, as DeepSpeed does: a sub-group takes them until a rank's share of it has `limit` elements."""
    group: list[int] = []
    held = 0
    for size in sizes:
        group.append(size)
        held += share_of(size, ranks)
        if held >= limit:
            yield group
            group, held = [], 0
    if group:
        yield group


def share_of(size: int, ranks: int) -> int:
    """Elements of a parameter that a rank holds under ZeRO-3."""
    return -(-size // ranks)


def shares_of(sizes: Iterable[int], ranks: int) -> int:
    """The same of several parameters together."""
    return sum(share_of(size, ranks) for size in sizes)


def on_disk(sizes: Iterable[int], limit: int, ranks: int, kept: int) -> list[int]:
    """The parameters that go to NVMe when `kept` elements of host memory are there for the others: in whole sub-groups,
    from the first on that has no room."""
    found, end = [], 0
    for group in sub_groups(sizes, limit, ranks):
        end += shares_of(group, ranks)
        if end > kept:
            found += group
    return found


def largest_group(model: ModelFacts, engine: Engine, ranks: int) -> int:
    """Elements of the largest sub-group of a rank, but for where groups with and without weight decay part."""
    return max(shares_of(group, ranks) for group in sub_groups(model.sizes, engine.sub_group, ranks))


def _bucket(model: ModelFacts, engine: Engine, on_cuda: bool) -> int:
    """On a card the whole bucket; host memory that no gradient reaches is never touched, so it takes no room."""
    size = engine.reduce_bucket if on_cuda else min(engine.reduce_bucket, model.total)
    return FLOAT * size * (2 if engine.overlap_comm and on_cuda and engine.stage < 3 else 1)


def _fullest_bucket(sizes: Sequence[int], engine: Engine) -> int:
    """Elements of the fullest reduction bucket with several gradients, which ZeRO-3 copies into one. They come in
    about the reverse order of the parameters."""
    buckets: list[list[int]] = [[]]
    for size in reversed(sizes):
        if buckets[-1] and sum(buckets[-1]) + size > engine.reduce_bucket:
            buckets.append([])
        buckets[-1].append(size)
    return max(sum(bucket) if len(bucket) > 1 else 0 for bucket in buckets)


def _adam_temporaries(engine: Engine, on_cuda: bool) -> int:
    """Copies that torch's AdamW makes of what it updates; DeepSpeed's fused one makes none."""
    if not engine.torch_adam:
        return 0
    return 1 if on_cuda else 2


def _pinned(size: int) -> int:
    """torch's pinned allocator hands out powers of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0
