"""metrics.csv: one row a logged step, appended over all starts of a run."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import math
from pathlib import Path
from typing import Any

from tbf.checkpoints.files import write_atomic
from tbf.train.callbacks.base import Callback, StepMetrics

logger = logging.getLogger(__name__)

_FROM_STEP = [field.name for field in dataclasses.fields(StepMetrics) if field.name != "eta_s"]
_FROM_EVAL = ["val_loss", "val_masked_accuracy"]
COLUMNS = [*_FROM_STEP, *_FROM_EVAL, "superseded"]
_DECIMALS = {
    "epoch": 5,
    "tokens_per_s": 1,
    "mfu": 4,
    "device_mem_gb": 3,
    "host_mem_gb": 3,
    "data_wait": 4,
    "card_temperature_c": 0,
    "card_power_w": 0,
    "card_clock_mhz": 0,
    "expert_share_min": 4,
    "expert_share_max": 4,
    "router_entropy": 4,
    "router_balance": 4,
    "router_z": 4,
    "router_dropped": 0,
}


class CsvMetrics(Callback):
    """Writes a row every `log_every` steps, for each evaluated step, and when an update was skipped.

    A run that resumes from step s has taken the later steps again: their old rows stay, with `superseded` set to 1.
    """

    monitor = True

    def __init__(self, path: Path, log_every: int) -> None:
        self.path = path
        self.log_every = log_every
        self._skipped = 0
        self._last: dict[str, Any] = {}
        self._last_start = 0  # where the last row begins, in bytes

    def on_start(self, trainer: Any) -> None:
        rows = supersede(read_rows(self.path), trainer.step)
        columns = [*COLUMNS, *(key for key in (rows[0] if rows else {}) if key not in COLUMNS)]
        content = (_line(columns, dict(zip(columns, columns))) + "".join(_line(columns, row) for row in rows)).encode()
        if not self.path.exists() or self.path.read_bytes() != content:
            write_atomic(self.path, content)
        self._columns, self._last, self._last_start = columns, {}, len(content)

    def on_rollback(self, trainer: Any) -> None:
        self.on_start(trainer)

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        due = metrics.step % self.log_every == 0 or metrics.step in (1, trainer.max_steps)
        if due or metrics.skipped > self._skipped or self._last.get("step") == metrics.step:
            self._put({name: _plain(name, getattr(metrics, name)) for name in _FROM_STEP})
        self._skipped = metrics.skipped

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        self._put({"step": step, **{name: metrics[name] for name in _FROM_EVAL}})

    def _put(self, values: dict[str, Any]) -> None:
        """Appends a row, or completes the last one when it is of the same step."""
        with self.path.open("r+b") as handle:
            end = handle.seek(0, io.SEEK_END)
            if values["step"] == self._last.get("step"):
                values = {**self._last, **values}
                handle.seek(self._last_start)
            else:
                values = {**values, "superseded": 0}
                self._last_start = end
            self._last = values
            handle.write(_line(self._columns, values).encode())
            handle.truncate()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file; a last line that a crash cut short, or filled with zeros, is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n") and "\0" not in line))
    whole = [row for row in rows if None not in row and None not in row.values() and row.get("step", "").isdecimal()]
    if len(whole) < len(lines) - 1:
        logger.warning("%s: left out %d damaged lines", path, len(lines) - 1 - len(whole))
    return whole


def supersede(rows: list[dict[str, str]], step: int) -> list[dict[str, str]]:
    """Marks the rows of steps that a run which stands at `step` will take again."""
    return [{**row, "superseded": "1"} if step == 0 or int(row["step"]) > step else row for row in rows]


def _line(columns: list[str], values: dict[str, Any]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerow(values)
    return text.getvalue()


def _plain(name: str, value: float) -> float | str:
    """Full precision for what resumed runs are compared by; nothing for what is not known."""
    if name not in _DECIMALS:
        return value
    return "" if math.isnan(value) else round(value, _DECIMALS[name])
