"""Goes back to the last healthy checkpoint, past the rows that led away from it; or gives the run up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tbf.errors import CheckpointError, TrainingHalted
from tbf.train.emergency import write_emergency
from tbf.train.schedule import moving_mask

log = logging.getLogger("tbf")


def roll_back(trainer: Any) -> None:
    """Restores the last healthy checkpoint and continues with the rows that come after the failed step. Collective.

    The rows between the checkpoint and the failure are left out: the same weights on other data got past the loss
    spikes of PaLM (arXiv 2204.02311, section 5.1). Raises TrainingHalted, after an emergency dump, when there is
    nothing to go back to or when going back did not help `max_rollbacks` times.
    """
    guard, train, failed_at = trainer.guard, trainer.config.train, trainer.step
    before, cursor = guard.state_dict(), trainer.loader.cursor
    if guard.rollbacks >= train.max_rollbacks:
        raise _halt(trainer, f"{guard.rollbacks} returns to an earlier checkpoint did not help")
    path = _last_healthy(trainer)
    if path is None:
        raise _halt(trainer, "there is no healthy checkpoint to go back to")
    state = trainer.checkpoints.load(trainer.engine, path, trainer.rank, trainer.world_size)
    trainer.load_state_dict(state)
    log.warning(
        "ROLLBACK %d of %d: from step %d to %s, without the %d rows in between%s",
        *(before["rollbacks"] + 1, train.max_rollbacks, failed_at, path, cursor - trainer.loader.cursor),
        f", at {train.rollback_lr_factor:g} times the learning rate" if train.rollback_lr_factor != 1.0 else "",
    )
    loader = trainer.loader
    loader.cursor = cursor
    loader.mask = moving_mask(loader.mask, trainer.config, trainer.step, cursor, loader.rows_per_step)
    guard.rolled_back(before, failed_at)
    trainer.callbacks.on_rollback(trainer)


def _last_healthy(trainer: Any) -> Path | None:
    try:
        return trainer.checkpoints.last_healthy()
    except CheckpointError as error:
        log.error("%s", error)
        return None


def _halt(trainer: Any, why: str) -> TrainingHalted:
    guard, train = trainer.guard, trainer.config.train
    folder = write_emergency(trainer)
    return TrainingHalted(
        f"{len(guard.bad_steps)} of the last {train.bad_window} steps up to step {trainer.step} were skipped "
        f"({guard.reason}) and {why}; state, batch and diagnosis are in {folder}. Lower train.learning_rate and "
        "resume, or look at the batch"
    )
