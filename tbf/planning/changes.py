"""Changes to a run that trade time for memory, or back, and how a user writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tbf.config import RunConfig
from tbf.planning.engine_state import Engine


@dataclass(frozen=True)
class Change:
    """A run and an engine that differ from the given ones."""

    summary: str
    """For a person, e.g. `micro batch 4 instead of 8`."""
    run: RunConfig
    engine: Engine


_PLACES = {
    "ZeRO-2 on the card": {"stage": 2, "offload_optimizer": "none", "offload_param": "none", "torch_adam": True},
    "ZeRO-2, optimizer in host memory": {"stage": 2, "offload_optimizer": "cpu", "offload_param": "none"},
    "ZeRO-1, optimizer in host memory": {"stage": 1, "offload_optimizer": "cpu", "offload_param": "none"},
    "ZeRO-3 on the cards": {"stage": 3, "offload_optimizer": "none", "offload_param": "none", "torch_adam": True},
    "ZeRO-3, optimizer in host memory": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "none"},
    "ZeRO-3, optimizer and weights in host memory": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "ZeRO-3, optimizer and weights on NVMe": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"},
}
"""Where the optimizer and the weights lie."""
_GRANULARITIES = (("none", False), ("layer", False), ("loop", False), ("layer", True), ("loop", True))
_SANE_BUCKET, _LIVE, _PREFETCH, _SUB_GROUP = 50_000_000, 200_000_000, 20_000_000, 100_000_000


def other_places(run: RunConfig, engine: Engine) -> Iterator[Change]:
    """Every other place for optimizer and weights."""
    for summary, values in _PLACES.items():
        values = {"torch_adam": False, **values}
        if values["stage"] == 3 and engine.stage != 3:
            values |= {"max_live": _LIVE, "prefetch": _PREFETCH, "sub_group": _SUB_GROUP}
        changed = replace(engine, **values)
        if any(getattr(changed, name) != getattr(engine, name) for name in _PLACE_KEYS):
            yield Change(summary, run, changed)


_PLACE_KEYS = ("stage", "offload_optimizer", "offload_param")


def other_granularities(run: RunConfig, engine: Engine) -> Iterator[Change]:
    """Every other way to keep or recompute activations."""
    for granularity, on_host in _GRANULARITIES:
        if (granularity, on_host) != (engine.granularity, engine.cpu_checkpointing):
            summary = f"{granularity} checkpointing" + (" with its states in host memory" if on_host else "")
            yield Change(summary, run, replace(engine, granularity=granularity, cpu_checkpointing=on_host))


def other_micro_batches(run: RunConfig, engine: Engine) -> Iterator[Change]:
    """Smaller micro batches first the next, and larger ones, for the same global batch."""
    rows, total = run.train.micro_batch_size, run.train.micro_batch_size * engine.accumulation
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    for size in [*reversed([d for d in divisors if d < rows]), *(d for d in divisors if d > rows)]:
        yield with_micro_batch(run, engine, size)


def with_micro_batch(run: RunConfig, engine: Engine, size: int) -> Change:
    """Another micro batch that divides the same global batch."""
    rows, accumulation = run.train.micro_batch_size, run.train.micro_batch_size * engine.accumulation // size
    changed = run.replace(train={"micro_batch_size": size, "gradient_accumulation_steps": accumulation})
    summary = f"micro batch {size} instead of {rows}, accumulated {accumulation} times"
    return Change(summary, changed, replace(engine, accumulation=accumulation))


def other_details(run: RunConfig, engine: Engine) -> Iterator[Change]:
    """Smaller buffers and fewer kept checkpoints."""
    if engine.reduce_bucket > _SANE_BUCKET:
        yield Change(
            f"reduction buckets of {_SANE_BUCKET:,} elements", run, replace(engine, reduce_bucket=_SANE_BUCKET)
        )
    if run.train.keep_last > 2 or run.train.keep_best > 0:
        fewer = run.replace(train={"keep_last": 2, "keep_best": 0})
        yield Change("only the two newest checkpoints", fewer, engine)


def write_up(old: tuple[RunConfig, Engine], new: tuple[RunConfig, Engine]) -> list[str]:
    """The lines to change: `ds_config: key = value`, `ds_config: remove key` and `--set section.key=value`."""
    (old_run, old_engine), (new_run, new_engine) = old, new
    crosses = (old_engine.stage == 3) != (new_engine.stage == 3)
    removed = [f"zero_optimization.{key}" for key in old_engine.stage_keys] if crosses else []
    lines = [f"ds_config: remove {key}" for key in removed]
    for field, key in _DS_KEYS.items():
        value = getattr(new_engine, field)
        if value != getattr(old_engine, field) and not key.startswith(tuple(removed)):
            lines.append(f"ds_config: {key} = {_json(value)}")
    for place in ("offload_optimizer", "offload_param"):
        if getattr(new_engine, place) == "nvme" and not old_engine.nvme_path:
            lines.append(f'ds_config: zero_optimization.{place}.nvme_path = "<a folder on NVMe>"')
    for section in ("model", "data", "train"):
        before, after = vars(getattr(old_run, section)), vars(getattr(new_run, section))
        lines += [f"--set {section}.{key}={after[key]}" for key in after if after[key] != before[key]]
    return lines


_DS_KEYS = {
    "stage": "zero_optimization.stage",
    "offload_optimizer": "zero_optimization.offload_optimizer.device",
    "offload_param": "zero_optimization.offload_param.device",
    "max_live": "zero_optimization.stage3_max_live_parameters",
    "prefetch": "zero_optimization.stage3_prefetch_bucket_size",
    "sub_group": "zero_optimization.sub_group_size",
    "reduce_bucket": "zero_optimization.reduce_bucket_size",
    "torch_adam": "optimizer.params.torch_adam",
    "granularity": "activation_checkpointing.granularity",
    "cpu_checkpointing": "activation_checkpointing.cpu_checkpointing",
}


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
