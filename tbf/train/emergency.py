"""What is kept of a run at the moment the guard gives it up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tbf.checkpoints import ranks
from tbf.checkpoints.files import to_json
from tbf.train.autopsy import examine, strict
from tbf.train.checkpoint import CheckpointStore
from tbf.train.schedule import loop_count


def write_emergency(trainer: Any) -> Path:
    """Writes `emergency/step-<step>-<time>/`: a full checkpoint, each rank's batch, and a diagnosis. Collective.

    The weights are the last good ones: none of the skipped steps touched them. diagnosis.json says why the last steps
    were skipped and, for each rank, what running its batch once more showed (see `autopsy.examine`).
    """
    stamp = ranks.from_rank_0(time.strftime("%Y%m%d-%H%M%S"))
    folder = trainer.run_dir / "emergency" / f"step-{trainer.step:08d}-{stamp}"
    folder.mkdir(parents=True, exist_ok=True)
    batches = trainer.batches
    tensors = {f"{name}.{i}": value.cpu() for i, batch in enumerate(batches) for name, value in batch.items()}
    save_file(tensors, folder / f"batch_rank{trainer.rank}.safetensors")
    store = CheckpointStore(folder / "checkpoints", keep_last=2, keep_best=0)
    store.save(trainer.engine, trainer.step, trainer.state_dict(), trainer.rank, trainer.world_size, healthy=False)

    module = trainer.engine.module
    bad = [name for name, p in module.named_parameters() if p.numel() and not p.isfinite().all()]
    loops = loop_count(trainer.step - 1, trainer.config.train, trainer.config.model.num_loops)
    found = ranks.gather(examine(trainer.engine, batches, loops))
    if trainer.is_main:
        rows = trainer.loader.rows_per_step
        diagnosis = {
            "time": stamp,
            "step": trainer.step,
            "reason": trainer.guard.reason,
            "skipped_steps": list(trainer.guard.bad_steps),
            "rollbacks": trainer.guard.rollbacks,
            "rows": [trainer.loader.cursor - rows, trainer.loader.cursor],
            "non_finite_parameters": bad,
            "ranks": found,
        }
        (folder / "diagnosis.json").write_bytes(to_json(strict(diagnosis)))
    return folder
