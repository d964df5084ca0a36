"""What to change when memory does not suffice: quick answers, for a run that is about to end.

Unlike `search`, nothing is traced: needs are estimated, in milliseconds, and the mildest change of each kind is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tbf.config import RunConfig
from tbf.planning.changes import (
    Change,
    other_details,
    other_granularities,
    other_micro_batches,
    other_places,
    write_up,
)
from tbf.planning.engine_state import Engine
from tbf.planning.plan import MemoryPlan, Planner, Verdict

_SAVING = 0.9
"""A change is worth naming when it leaves at most this share of the need, where one does."""


@dataclass(frozen=True)
class Relief:
    """A change, how a user writes it, and the bytes that the run would then need."""

    change: Change
    lines: list[str]
    needed: float

    def __str__(self) -> str:
        return f"{self.change.summary}, for {self.needed / 1e9:.2f} GB ({'; '.join(self.lines)})"


def reliefs(planner: Planner, run: RunConfig, engine: Engine, resource: str, count: int = 3) -> list[Relief]:
    """At most `count` single changes that lessen the need of `resource`, those that make everything fit first,
    then those that save most."""
    now = _verdict(planner.estimate(run, engine), resource)
    found = []
    for changes in _KINDS:
        tried = [(change, planner.estimate(change.run, change.engine)) for change in changes(run, engine)]
        less = [(change, plan) for change, plan in tried if _verdict(plan, resource).needed < now.needed]
        enough = [(change, plan) for change, plan in less
                  if plan.fits and _verdict(plan, resource).needed <= _SAVING * now.needed]  # fmt: skip
        if less:
            smallest = min(less, key=lambda each: _verdict(each[1], resource).needed)
            found.append(enough[0] if enough else smallest)
    found.sort(key=lambda each: (not each[1].fits, 0 if each[1].fits else _verdict(each[1], resource).needed))
    return [
        Relief(change, write_up((run, engine), (change.run, change.engine)), _verdict(plan, resource).needed)
        for change, plan in found[:count]
    ]


def _smaller_micro_batches(run: RunConfig, engine: Engine) -> Iterator[Change]:
    for change in other_micro_batches(run, engine):
        if change.run.train.micro_batch_size < run.train.micro_batch_size:
            yield change


def _shorter_rows(run: RunConfig, engine: Engine) -> Iterator[Change]:
    half = run.data.seq_len // 2
    if half >= 8:
        yield Change(f"rows of {half} tokens", run.replace(data={"seq_len": half}), engine)


def _fewer_predictions(run: RunConfig, engine: Engine) -> Iterator[Change]:
    """Less to predict means fewer rows of logits, which a large vocabulary makes long."""
    rate, end = run.data.mask_rate / 2, min(run.data.mask_rate_end, run.data.mask_rate / 2)
    yield Change(f"a mask rate of {rate:g}", run.replace(data={"mask_rate": rate, "mask_rate_end": end}), engine)


def _fewer_layers(run: RunConfig, engine: Engine) -> Iterator[Change]:
    half = run.model.num_layers // 2
    if half:
        yield Change(f"{half} layers", run.replace(model={"num_layers": half}), engine)


def _verdict(plan: MemoryPlan, resource: str) -> Verdict:
    return next(verdict for verdict in plan.verdicts if verdict.resource == resource)


_KINDS = (_smaller_micro_batches, other_granularities, other_places, other_details, _shorter_rows, _fewer_predictions,
          _fewer_layers)  # fmt: skip
"""What changes the model or its rows comes last."""
