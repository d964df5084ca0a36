"""What a run folder says about a run: its metrics as columns of numbers, its settings, its results."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tbf.errors import CheckpointError
from tbf.evaluate.results import read_results
from tbf.train.callbacks.csv import read_rows


@dataclass(frozen=True)
class History:
    """A run as it stands on the disk. Steps that were taken again after a resume count once."""

    folder: Path
    columns: dict[str, np.ndarray]
    """float64 [rows] of each column of metrics.csv, NaN where a row says nothing."""
    config: dict[str, Any]
    status: dict[str, Any]
    starts: list[dict[str, Any]]
    """environment.json: one entry a start."""
    results: list[dict[str, Any]]
    """Of `tbf eval` and `tbf finetune` on the run's export."""
    export: Path | None

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a column where it has finite values."""
        values = self.columns.get(name, np.empty(0))
        known = np.isfinite(values)
        return (self.columns["step"][known], values[known]) if len(values) else (values, values)

    def last(self, name: str) -> float | None:
        values = self.curve(name)[1]
        return float(values[-1]) if len(values) else None


def read_history(folder: Path) -> History:
    """Reads a run folder. Raises CheckpointError when it is none, or nothing was logged yet."""
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no config.yaml; give one that launch/train.py made")
    rows = [row for row in read_rows(folder / "metrics.csv") if row.get("superseded") != "1"]
    if not rows:
        raise CheckpointError(f"{folder}/metrics.csv has no rows yet; wait for the first logged step")
    names = [name for name in rows[0] if name != "superseded"]
    columns = {name: np.array([_number(row.get(name, "")) for row in rows]) for name in names}
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        sections = {name: dict(config[name]) for name in ("model", "data", "train")}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder}/config.yaml cannot be read ({error}); restore it") from None
    export = folder / "export"
    starts = _json(folder / "environment.json")
    return History(
        folder=folder,
        columns=columns,
        config={"preset": config.get("preset", "custom"), **sections},
        status=_json(folder / "run_status.json") or {},
        starts=starts if isinstance(starts, list) else [],
        results=read_results(export),
        export=export if (export / "config.json").is_file() else None,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _json(path: Path) -> Any:
    """A file that may be missing or damaged: the page does without it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
