"""Finds the change that makes a plan fit, and the fastest plan that a machine can carry.

Nothing here is a rule of thumb: each candidate is planned anew, with its own trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tbf.config import RunConfig
from tbf.planning.changes import (
    Change,
    other_details,
    other_granularities,
    other_micro_batches,
    other_places,
    with_micro_batch,
)
from tbf.planning.engine_state import Engine
from tbf.planning.plan import Plan, Planner, Verdict

NO_CURE = "nothing that was tried makes it fit: use a smaller model, shorter rows or a larger machine"


def with_cures(planner: Planner, plan: Plan, run: RunConfig, engine: Engine) -> Plan:
    """The plan with, for each resource that is too small, the cheapest change that would make everything fit."""
    if plan.fits:
        return plan
    found = cures(planner, run, engine, count=1)
    cure = f"would fit with {found[0][0].summary}" if found else NO_CURE
    if not found:
        best = suggest(planner, run, engine)
        cure = f"would fit with {best[0].summary}" if best else NO_CURE
    return replace(plan, verdicts=[v if v.fits else Verdict(v.resource, v.needed, v.available, cure)
                                   for v in plan.verdicts])  # fmt: skip


def cures(planner: Planner, run: RunConfig, engine: Engine, count: int) -> list[tuple[Change, Plan]]:
    """Single changes after which everything fits, the fastest first; of each kind the best. At most `count`."""
    kinds = (other_granularities, other_micro_batches, other_places, other_details)
    found = []
    for kind in kinds:
        fitting = _fitting(planner, kind(run, engine), stop_at_first=kind is other_micro_batches)
        if fitting:
            found.append(min(fitting, key=_seconds))
    return sorted(found, key=_seconds)[:count]


def suggest(planner: Planner, run: RunConfig, engine: Engine) -> tuple[Change, Plan] | None:
    """The fastest combination of places, granularity and micro batch that fits, for the same global batch, or None.

    Micro batches grow until no combination holds them: memory only grows with them.
    """
    best: tuple[Change, Plan] | None = None
    total = run.train.micro_batch_size * engine.accumulation
    sizes = [size for size in (2**i for i in range(total.bit_length())) if total % size == 0]
    places = [Change("", run, engine), *other_places(run, engine)]
    if planner.machine.ranks == 1 or not planner.machine.device.on_cuda:
        places = [place for place in places if place.summary != "ZeRO-3 on the cards"]
    for granularity in (Change("", run, engine), *other_granularities(run, engine)):
        for size in sizes:
            candidates = [_combined(run, engine, place, granularity, size) for place in places]
            fitting = _fitting(planner, candidates)
            if not fitting:
                break
            fastest = min(fitting, key=_seconds)
            if best is None or _seconds(fastest) < 0.99 * _seconds(best):
                best = fastest
    return best


def _combined(run: RunConfig, engine: Engine, place: Change, granularity: Change, size: int) -> Change:
    kept = {name: getattr(granularity.engine, name) for name in ("granularity", "cpu_checkpointing")}
    micro = with_micro_batch(run, replace(place.engine, **kept), size)
    parts = [change.summary for change in (place, granularity) if change.summary]
    parts += [micro.summary] if size != run.train.micro_batch_size else []
    return Change(", ".join(parts) or "the settings as they are", micro.run, micro.engine)


def _fitting(
    planner: Planner, changes: Iterator[Change] | list[Change], *, stop_at_first: bool = False
) -> list[tuple[Change, Plan]]:
    found = []
    for change in changes:
        plan = planner.plan(change.run, change.engine)
        if plan.fits:
            found.append((change, plan))
            if stop_at_first:
                break
    return found


def _seconds(candidate: tuple[Change, Plan]) -> float:
    return candidate[1].time.total
