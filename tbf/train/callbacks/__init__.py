"""What happens around the training loop: showing, recording, evaluating, saving."""

from __future__ import annotations

from pathlib import Path

from tbf.config import RunConfig
from tbf.train.callbacks.base import Callback, CallbackList, StepMetrics
from tbf.train.callbacks.checkpointing import Checkpointing
from tbf.train.callbacks.csv import CsvMetrics
from tbf.train.callbacks.evaluation import Evaluation
from tbf.train.callbacks.log import RankLog, TrainLog
from tbf.train.callbacks.progress import Progress
from tbf.train.callbacks.status import Status
from tbf.train.callbacks.tensorboard import TensorBoard
from tbf.train.callbacks.thermal import ThermalGuard
from tbf.train.callbacks.wandb import WandB, require_wandb
from tbf.train.thermal import nvml_reader

__all__ = ["Callback", "CallbackList", "StepMetrics", "default_callbacks"]


def default_callbacks(run: RunConfig, run_dir: Path, *, rank: int, card_uuid: str = "") -> CallbackList:
    """The callbacks of a run: the thermal guard of this rank's card, evaluation, then checkpoints, on every rank; on
    rank 0 also all that watch, on the others a log of their own.

    Raises ConfigError on every rank when Weights & Biases is asked for and not installed.
    """
    train = run.train
    if train.wandb:
        require_wandb()
    monitors: list[Callback] = [RankLog(run_dir / "logs" / f"rank{rank}.log")]
    if rank == 0:
        monitors = [
            Status(run_dir),
            TrainLog(run_dir / "train.log", train.log_every),
            CsvMetrics(run_dir / "metrics.csv", train.log_every),
            *([TensorBoard(run_dir / "tb", train.log_every)] if train.tensorboard else []),
            *([WandB(run_dir, train.wandb_project, train.log_every)] if train.wandb else []),
            Progress(train.log_every),
        ]
    sensor = nvml_reader(card_uuid) if card_uuid else None
    thermal = [ThermalGuard(sensor, train.thermal_soft_c, train.thermal_hard_c)] if sensor else []
    return CallbackList(
        [*thermal, *monitors, Evaluation(train.eval_every), Checkpointing(train.save_every, train.save_in_background)]
    )
