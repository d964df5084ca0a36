"""Weights & Biases, an optional extra; WANDB_MODE=offline keeps everything in the run folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import secrets
from pathlib import Path
from typing import Any

from tbf.checkpoints.files import write_atomic
from tbf.errors import ConfigError
from tbf.train.callbacks.base import Callback, StepMetrics


def require_wandb() -> None:
    """Raises ConfigError when the package is not there, on any rank, before anything is loaded."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "train.wandb is true, but the wandb package is not installed; pip install 'tbf[wandb]', "
            "or pass --set train.wandb=false"
        )


class WandB(Callback):
    """Logs every `log_every` steps and at evaluations; a resumed run continues the same W&B run."""

    monitor = True

    def __init__(self, run_dir: Path, project: str, log_every: int) -> None:
        require_wandb()
        self.run_dir = run_dir
        self.project = project
        self.log_every = log_every
        self._run: Any = None

    def on_start(self, trainer: Any) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=self.project,
                name=self.run_dir.name,
                dir=str(self.run_dir),
                id=self._run_id(),
                resume="allow",
                config=trainer.config.to_dict(),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases does not start ({' '.join(str(error).split())}); run `wandb login`, set "
                "WANDB_MODE=offline, or pass --set train.wandb=false"
            ) from None
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back, as a resumed run does

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        if metrics.step % self.log_every == 0 or metrics.step in (1, trainer.max_steps):
            values = dataclasses.asdict(metrics)
            step = values.pop("step")
            self._run.log({"step": step, **{f"train/{name}": value for name, value in values.items()}})

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **{f"eval/{name}": value for name, value in metrics.items()}})

    def on_end(self, trainer: Any, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("done", "stopped") else 1)

    def _run_id(self) -> str:
        path = self.run_dir / "wandb_run_id"
        if not path.exists():
            write_atomic(path, secrets.token_hex(4).encode())
        return path.read_text().strip()
