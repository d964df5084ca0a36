"""Evaluates on the held-out rows while training."""

from __future__ import annotations

from typing import Any

from tbf.train.callbacks.base import Callback, StepMetrics


class Evaluation(Callback):
    """Before the first step of a fresh run, every `eval_every` steps, and at the last one. Runs on every rank."""

    def __init__(self, eval_every: int) -> None:
        self.eval_every = eval_every

    def on_start(self, trainer: Any) -> None:
        if trainer.step == 0:
            self._evaluate(trainer)

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        if metrics.step % self.eval_every == 0 or metrics.step == trainer.max_steps:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Any) -> None:
        trainer.callbacks.on_eval(trainer, trainer.step, trainer.evaluate())
