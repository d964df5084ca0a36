"""What a person at the terminal, or reading a job's output, sees of the training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from tbf.train.callbacks.base import Callback, StepMetrics
from tbf.train.callbacks.text import duration, eval_line, step_line, summary


class Progress(Callback):
    """A bar on a terminal; elsewhere one line every `log_every` steps."""

    monitor = True

    def __init__(self, log_every: int, stream: TextIO | None = None) -> None:
        self.log_every = log_every
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None

    def on_start(self, trainer: Any) -> None:
        if self._stream.isatty():
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.step,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}  {postfix}",
            )

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"{summary(metrics)}  ETA {duration(metrics.eta_s)}", refresh=False)
            self._bar.update()
        elif metrics.step % self.log_every == 0 or metrics.step in (1, trainer.max_steps):
            self._say(step_line(metrics, trainer.max_steps))

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        self._say(eval_line(step, metrics))

    def on_checkpoint(self, trainer: Any, path: Path, step: int) -> None:
        self._say(f"step {step}  saved {path}")

    def on_rollback(self, trainer: Any) -> None:
        if self._bar is not None:
            self._bar.n = trainer.step

    def on_end(self, trainer: Any, status: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, text: str) -> None:
        tqdm.write(text, file=self._stream)  # keeps a bar on the last line
        self._stream.flush()
