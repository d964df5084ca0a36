"""Decides when a checkpoint is saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tbf.train.callbacks.base import Callback, StepMetrics

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Every `save_every` steps, at the last one, and when the run is asked to stop. Runs on every rank.

    Comes after Evaluation in the list: a checkpoint carries the validation loss only if this very step was evaluated.
    """

    def __init__(self, save_every: int, background: bool = False) -> None:
        """`background`: all but the last one beside training, see CheckpointStore.save."""
        self.save_every, self.background = save_every, background
        self._evaluated: tuple[int, float] | None = None
        self._at = 0
        self._saved: tuple[Path, int] | None = None

    def on_start(self, trainer: Any) -> None:
        self._at = trainer.step
        trainer.checkpoints.prepare(trainer.engine, trainer.rank)
        eval_every = trainer.config.train.eval_every
        if self.save_every % eval_every:
            logger.info(
                "train.save_every %d is no multiple of train.eval_every %d: only checkpoints of evaluated steps can "
                "become the best one",
                *(self.save_every, eval_every),
            )

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        if metrics.step % self.save_every == 0 or metrics.step == trainer.max_steps:
            self._save(trainer, background=self.background and metrics.step < trainer.max_steps)

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        self._evaluated = (step, metrics["val_loss"])

    def on_rollback(self, trainer: Any) -> None:
        self._at = trainer.step

    def on_end(self, trainer: Any, status: str) -> None:
        if status not in ("done", "stopped"):
            trainer.checkpoints.let_go()
            return
        if trainer.step > self._at:
            self._save(trainer)
        self._announce(trainer)

    def _save(self, trainer: Any, background: bool = False) -> None:
        self._announce(trainer)
        step, val_loss = self._evaluated or (None, None)
        path = trainer.checkpoints.save(
            trainer.engine,
            trainer.step,
            trainer.state_dict(),
            trainer.rank,
            trainer.world_size,
            val_loss if step == trainer.step else None,
            healthy=trainer.guard.healthy,
            background=background,
        )
        self._at = trainer.step
        self._saved = (path, trainer.step)
        if not background:
            self._announce(trainer)

    def _announce(self, trainer: Any) -> None:
        """Waits for a save in the background; the other callbacks hear of a checkpoint once it is complete."""
        trainer.checkpoints.finish()
        if self._saved is not None:
            (path, step), self._saved = self._saved, None
            trainer.callbacks.on_checkpoint(trainer, path, step)
