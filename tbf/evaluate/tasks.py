"""Labelled tasks on the disk: a folder with train, validation and test parquet files, and a README.

The columns say what kind of task it is:

- `tokens` (list of words) and one more list column, e.g. `ner_tags` or `upos`: a label for each word
- `text` and `label` (or `score`): a class, or a number, for each text
- `sentence1`, `sentence2` and `label` or `score`: the same for each pair

A label column of fractions is a regression. A README line `Metric: ...` names the metric that counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tbf.errors import DataError, nearest
from tbf.evaluate.metrics import METRICS

SPLITS = ("train", "validation", "test")
INPUTS = (("token", ("tokens",)), ("pair", ("sentence1", "sentence2")), ("sentence", ("text",)))
LABEL_COLUMNS = ("label", "score")
_SPOKEN = (
    ("mcc", r"matthews|\bmcc\b"),
    ("entity_f1", r"entity|span"),
    ("macro_f1", r"macro|\bf1\b"),
    ("accuracy", r"accuracy"),
    ("spearman", r"spearman"),
    ("pearson", r"pearson"),
)


@dataclass(frozen=True)
class Example:
    """One row: a text, two texts, or the words of a sentence, with what should be said about it."""

    texts: tuple[str, ...]
    target: np.ndarray
    """int64 [words] or [1]: numbers of labels; float64 [1]: a number."""


@dataclass(frozen=True)
class Task:
    """A task with its rows."""

    name: str
    kind: str
    """token, sentence or pair."""
    labels: tuple[str, ...]
    """Empty for a regression."""
    metric: str
    splits: dict[str, list[Example]]

    @property
    def regression(self) -> bool:
        return not self.labels


def read_task(folder: Path, metric: str | None = None, max_rows: dict[str, int | None] | None = None) -> Task:
    """Reads a task folder; `max_rows` keeps a random share of a split, always the same one.

    Raises DataError naming the file and row at fault: missing files or columns, empty rows, labels that train lacks.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one with train.parquet, validation.parquet and test.parquet")
    tables = {split: _table(folder / f"{split}.parquet") for split in SPLITS}
    kind, inputs, target = _layout(folder, tables["train"])
    for split, table in tables.items():
        for column in (*inputs, target):
            if column not in table:
                raise DataError(f"{folder / split}.parquet: no column '{column}', which train.parquet has")
            _check_values(folder / f"{split}.parquet", column, table[column], words=kind == "token")
    numbers = kind != "token" and all(isinstance(value, float) for value in tables["train"][target])
    values = tables["train"][target]
    flat = [label for row in values for label in row] if kind == "token" else values
    labels = () if numbers else tuple(map(str, sorted(set(flat))))
    if not numbers and len(labels) < 2:
        raise DataError(f"{folder}/train.parquet: every label is '{labels[0]}'; a task needs at least two")
    splits = {
        split: _examples(folder / f"{split}.parquet", kind, table, inputs, target, labels)
        for split, table in tables.items()
    }
    for split, most in (max_rows or {}).items():
        if most is not None and most < len(splits[split]):
            chosen = np.sort(np.random.default_rng(0).permutation(len(splits[split]))[:most])
            splits[split] = [splits[split][i] for i in chosen]
    return Task(folder.resolve().name, kind, labels, _metric(folder, metric, kind, labels), splits)


def _table(path: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; a task needs train.parquet, validation.parquet and test.parquet") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); copy it again") from None
    if table.num_rows == 0:
        raise DataError(f"{path}: the file has no rows; a task needs some in every split")
    try:
        return {name: table[name].to_pylist() for name in table.schema.names}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text that is not UTF-8 (byte 0x{error.object[error.start]:02x}); mend it") from None


def _layout(folder: Path, table: dict[str, list[Any]]) -> tuple[str, tuple[str, ...], str]:
    """(kind, input columns, label column) of a task."""
    found = ", ".join(table)
    for kind, inputs in INPUTS:
        if not set(inputs) <= set(table):
            continue
        others = [name for name in table if name not in inputs]
        if kind == "token":
            lists = [name for name in others if isinstance(table[name][0], list)]
            if len(lists) == 1:
                return kind, inputs, lists[0]
            raise DataError(
                f"{folder}: {len(lists)} list columns beside 'tokens' (columns: {found}); keep the labels' one"
            )
        for name in LABEL_COLUMNS:
            if name in others:
                return kind, inputs, name
        raise DataError(f"{folder}: no column 'label' or 'score' (columns: {found}); rename the one with the labels")
    raise DataError(
        f"{folder}: neither 'tokens', 'text' nor 'sentence1' and 'sentence2' (columns: {found}); "
        "rename the text's columns to one of these"
    )


def _check_values(path: Path, column: str, values: list[Any], *, words: bool) -> None:
    for number, value in enumerate(values):
        wrong = None
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            wrong = f"is {value}"
        elif words and (not isinstance(value, list) or not value or None in value):
            wrong = f"is {value!r:.60}, not a list of values"
        elif isinstance(value, str) and not value.strip():
            wrong = "is empty"
        if wrong:
            raise DataError(f"{path}, row {number}: '{column}' {wrong}; mend the row or delete it")


def _examples(
    path: Path, kind: str, table: dict[str, list[Any]], inputs: tuple[str, ...], target: str, labels: tuple[str, ...]
) -> list[Example]:
    numbers = {label: number for number, label in enumerate(labels)}
    found = []
    for row, (value, *parts) in enumerate(zip(table[target], *(table[name] for name in inputs))):
        texts = tuple(map(str, parts[0] if kind == "token" else parts))
        wanted = value if kind == "token" else [value]
        if kind == "token" and len(texts) != len(wanted):
            raise DataError(f"{path}, row {row}: {len(texts)} tokens but {len(wanted)} labels; they must be as many")
        if not labels:
            try:
                found.append(Example(texts, np.array(wanted, dtype=np.float64)))
            except (ValueError, TypeError):
                raise DataError(f"{path}, row {row}: the score {value!r:.40} is no number") from None
            continue
        unknown = next((label for label in map(str, wanted) if label not in numbers), None)
        if unknown is not None:
            raise DataError(
                f"{path}, row {row}: the label '{unknown}' is not in train.parquet; {nearest(unknown, labels)} "
                "Correct it, or give train an example of it"
            )
        found.append(Example(texts, np.array([numbers[str(label)] for label in wanted], dtype=np.int64)))
    return found


def _metric(folder: Path, asked: str | None, kind: str, labels: tuple[str, ...]) -> str:
    spans = kind == "token" and all(re.fullmatch(r"O|[BI]-.+", label) for label in labels)
    fitting = [name for name, metric in METRICS.items() if metric.regression == (not labels)]
    fitting = [name for name in fitting if name != "entity_f1" or spans]
    if asked:
        if asked not in fitting:
            raise DataError(f"{folder}: the metric '{asked}' does not fit this task; {nearest(asked, fitting)}")
        return asked
    readme = folder / "README.md"
    line = re.search(r"^Metric:(.*)$", readme.read_text("utf-8", "replace") if readme.is_file() else "", re.MULTILINE)
    for name, words in _SPOKEN:
        if line and name in fitting and re.search(words, line[1], re.IGNORECASE):
            return name
    return "spearman" if not labels else "entity_f1" if spans else "accuracy" if kind == "token" else "macro_f1"
