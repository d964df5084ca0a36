"""What is kept of a run at the moment the guard gives it up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tbf.checkpoints import ranks
from tbf.train.checkpoint import CheckpointStore


def write_emergency(trainer: Any, batches: list[dict[str, torch.Tensor]], loss: float, grad_norm: float) -> Path:
    """Writes `emergency/step-<step>-<time>/`: each rank's batch, a diagnosis and a full checkpoint. Collective.

    The weights are the last good ones: none of the skipped steps touched them.
    """
    stamp = ranks.from_rank_0(time.strftime("%Y%m%d-%H%M%S"))
    folder = trainer.run_dir / "emergency" / f"step-{trainer.step:08d}-{stamp}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{i}": value.cpu() for i, batch in enumerate(batches) for name, value in batch.items()}
    save_file(tensors, folder / f"batch_rank{trainer.rank}.safetensors")
    if trainer.is_main:
        bad = [name for name, p in trainer.engine.module.named_parameters() if p.numel() and not p.isfinite().all()]
        diagnosis = {
            "time": stamp,
            "step": trainer.step,
            "loss": repr(loss),
            "grad_norm": repr(grad_norm),
            "skipped_in_a_row": trainer.bad_steps,
            "rows": [trainer.loader.cursor - trainer.loader.rows_per_step, trainer.loader.cursor],
            "non_finite_parameters": bad,
        }
        (folder / "diagnosis.json").write_text(json.dumps(diagnosis, indent=2) + "\n", encoding="utf-8")
    store = CheckpointStore(folder / "checkpoints", keep_last=2, keep_best=0)
    store.save(trainer.engine, trainer.step, trainer.state_dict(), trainer.rank, trainer.world_size)
    return folder
