"""TensorBoard curves in the run folder's tb/."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from tbf.train.callbacks.base import Callback, StepMetrics


class TensorBoard(Callback):
    """Writes train/* every `log_every` steps and eval/* at evaluations; a resumed run hides the steps it retakes."""

    monitor = True

    def __init__(self, folder: Path, log_every: int) -> None:
        self.folder = folder
        self.log_every = log_every
        self._writer: Any = None

    def on_start(self, trainer: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1 if trainer.step else None)

    def on_rollback(self, trainer: Any) -> None:
        self._writer.close()
        self.on_start(trainer)

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        if metrics.step % self.log_every == 0 or metrics.step in (1, trainer.max_steps):
            for name, value in dataclasses.asdict(metrics).items():
                if name != "step" and not math.isnan(value):
                    self._writer.add_scalar(f"train/{name}", value, metrics.step)

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"eval/{name}", value, step)

    def on_checkpoint(self, trainer: Any, path: Path, step: int) -> None:
        self._writer.flush()

    def on_end(self, trainer: Any, status: str) -> None:
        self._writer.close()
