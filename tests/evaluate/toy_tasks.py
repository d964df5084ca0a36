"""Task folders that a tiny model can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ["perro", "gato", "casa", "calle", "España", "Madrid", "mundo", "capital", "ladra", "duerme"]
TAGS = {word: ("B-LOC" if word[0].isupper() else "O") for word in WORDS}


def sentences(count: int, start: int = 0) -> list[list[str]]:
    return [
        [WORDS[(3 * i + j * (1 + i % 4)) % len(WORDS)] for j in range(3 + i % 3)] for i in range(start, start + count)
    ]


def token_rows(count: int, start: int = 0) -> dict[str, list[Any]]:
    rows = sentences(count, start)
    return {"tokens": rows, "ner_tags": [[TAGS[word] for word in row] for row in rows]}


def sentence_rows(count: int, start: int = 0) -> dict[str, list[Any]]:
    rows = sentences(count, start)
    return {"text": [" ".join(row) for row in rows], "label": [int("Madrid" in row) for row in rows]}


def pair_rows(count: int, start: int = 0) -> dict[str, list[Any]]:
    rows = sentences(count, start)
    return {
        "sentence1": [" ".join(row) for row in rows],
        "sentence2": [" ".join(rows[i - 1] if i % 2 else row) for i, row in enumerate(rows)],
        "score": [5.0 * sum(word[0].isupper() for word in row) / len(row) for row in rows],
    }


def write_task(folder: Path, rows: Any = sentence_rows, readme: str = "", **splits: dict[str, list[Any]]) -> Path:
    """A task of 24, 8 and 8 rows; `splits` replaces whole splits."""
    folder.mkdir(parents=True)
    made = {"train": rows(24), "validation": rows(8, 24), "test": rows(8, 32), **splits}
    for split, columns in made.items():
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    if readme:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder
