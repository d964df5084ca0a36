"""Keeps run_status.json true while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tbf.train.callbacks.base import Callback, StepMetrics
from tbf.train.status import RunStatus


class Status(Callback):
    """Says in the run folder that training runs, where it stands, and how it ended."""

    monitor = True

    def __init__(self, run_dir: Path) -> None:
        self._status = RunStatus(run_dir)

    def on_start(self, trainer: Any) -> None:
        self._status.write("running", trainer.step)

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        self._status.heartbeat(metrics.step)

    def on_end(self, trainer: Any, status: str) -> None:
        self._status.write(status, trainer.step, **({"reason": trainer.reason} if trainer.reason else {}))
