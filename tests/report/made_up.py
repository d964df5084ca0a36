"""A run folder with curves that everybody can recognise."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from tbf.config import RunConfig
from tbf.train.callbacks.csv import COLUMNS

STEPS = 200


def write_run(folder: Path, *, experts: int = 1, steps: int = STEPS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    run = RunConfig(preset="<made> & up").replace(
        model={"use_moe": experts > 1, "num_experts": experts, "top_k_experts": 1}, train={"max_steps": steps}
    )
    run.save(folder / "config.yaml")
    rows = [row_of(step, experts) for step in range(1, steps + 1)]
    again = [{**row_of(step, experts), "loss": 99.0, "superseded": 1} for step in (10, 11)]
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*rows[:11], *again, *rows[11:]])
    (folder / "run_status.json").write_text(json.dumps({"state": "done", "step": steps}))
    (folder / "environment.json").write_text(json.dumps([{"gpus": ["Tesla P40"], "cpu_cores": 2}] * 2))
    return folder


def row_of(step: int, experts: int) -> dict[str, float]:
    row = {
        "step": step, "epoch": step / 100, "tokens": 2048 * step, "loss": 2 + 6 / math.sqrt(step),
        "masked_accuracy": step / 400, "lr": 1e-3, "grad_norm": 1 + 5 / step, "tokens_per_s": 1400 + step % 7,
        "device_mem_gb": 11.0, "host_mem_gb": 30.0, "data_wait": 0.01,
        "skipped": 2 if step > 50 else 0, "superseded": 0,
    }  # fmt: skip
    if step % 50 == 0:
        row |= {"val_loss": 2.1 + 6 / math.sqrt(step), "val_masked_accuracy": step / 420}
    if experts > 1:
        row |= {"expert_share_min": 0.5 / experts, "expert_share_max": 2 / experts, "router_entropy": 0.9}
    return row


def write_results(export: Path) -> None:
    (export / "evaluation").mkdir(parents=True)
    text = {"kind": "text", "masked_tokens": 1234, "loss": 4.56789, "masked_accuracy": 0.321}
    task = {
        "kind": "task", "task": "pos<b>", "task_kind": "token", "metric": "accuracy", "seeds": [{}, {}],
        "test": {"mean": 0.87654, "spread": 0.01234}, "rows": {"train": 1259, "validation": 1, "test": 427},
    }  # fmt: skip
    for name, result in (("text-novel", text), ("pos", task)):
        (export / "evaluation" / f"{name}.json").write_text(json.dumps(result))
    (export / "evaluation" / "other.json").write_text("{not ours")
