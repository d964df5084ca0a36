"""Decides when a checkpoint is saved."""

from __future__ import annotations

import logging
from typing import Any

from tbf.train.callbacks.base import Callback, StepMetrics

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Every `save_every` steps, at the last one, and when the run is asked to stop. Runs on every rank.

    Comes after Evaluation in the list: a checkpoint carries the validation loss only if this very step was evaluated.
    """

    def __init__(self, save_every: int) -> None:
        self.save_every = save_every
        self._evaluated: tuple[int, float] | None = None
        self._at = 0

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
            self._save(trainer)

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        self._evaluated = (step, metrics["val_loss"])

    def on_rollback(self, trainer: Any) -> None:
        self._at = trainer.step

    def on_end(self, trainer: Any, status: str) -> None:
        if status in ("done", "stopped") and trainer.step > self._at:
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        step, val_loss = self._evaluated or (None, None)
        path = trainer.checkpoints.save(
            trainer.engine,
            trainer.step,
            trainer.state_dict(),
            trainer.rank,
            trainer.world_size,
            val_loss if step == trainer.step else None,
            healthy=trainer.guard.healthy,
        )
        self._at = trainer.step
        trainer.callbacks.on_checkpoint(trainer, path, trainer.step)
