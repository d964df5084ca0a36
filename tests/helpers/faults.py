"""Faults that happen inside a training step of the trainer, at chosen rows of the data and on chosen ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from tbf.train.trainer import Trainer

KINDS = ("nan_loss", "nan_gradient", "nan_activation", "spike_loss", "spike_gradient")


class Fault(NamedTuple):
    """One of KINDS at data steps `first` to `last`, on `rank` or on all.

    A data step is a place in the data, not in the schedule: a run that went back and left these rows out is spared.
    """

    kind: str
    first: int
    last: int
    rank: int | None = None


@contextlib.contextmanager
def faults(*chosen: Fault) -> Iterator[None]:
    """Trainers made inside the block meet these faults."""
    active: set[str] = set()
    make, step = Trainer.__init__, Trainer.train_step

    def make_with_hooks(trainer: Trainer, **arguments: Any) -> None:
        make(trainer, **arguments)
        for kind in {fault.kind for fault in chosen}:
            _install(kind, trainer.engine.module, active)

    def step_with_faults(trainer: Trainer, steps: Any) -> Any:
        position = trainer.loader.cursor // trainer.loader.rows_per_step
        active.update(f.kind for f in chosen if f.first <= position <= f.last and f.rank in (None, trainer.rank))
        try:
            return step(trainer, steps)
        finally:
            active.clear()

    with mock.patch.object(Trainer, "__init__", make_with_hooks), mock.patch.object(
        Trainer, "train_step", step_with_faults
    ):  # fmt: skip
        yield


def _install(kind: str, module: torch.nn.Module, active: set[str]) -> None:
    if kind in ("nan_loss", "spike_loss"):
        factor = math.nan if kind == "nan_loss" else 1e3
        module.register_forward_hook(
            lambda _, inputs, output: (
                output._replace(loss=output.loss * factor, mlm_loss=output.mlm_loss * factor)
                if kind in active and output.loss is not None
                else None
            )
        )
    elif kind in ("nan_gradient", "spike_gradient"):
        factor = math.nan if kind == "nan_gradient" else 1e6
        parameter = next(p for p in module.parameters() if p.ndim > 1)
        parameter.register_hook(lambda gradient: gradient * factor if kind in active else gradient)
    elif kind == "nan_activation":
        layer = module.layers[1]
        layer.register_forward_hook(lambda _, inputs, output: _first_times_nan(output) if kind in active else None)
    else:
        raise ValueError(f"no fault '{kind}'; one of {', '.join(KINDS)}")


def _first_times_nan(output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0] * math.nan, *output[1:])
    return output * math.nan
