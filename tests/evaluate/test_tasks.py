from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbf.errors import DataError
from tbf.evaluate.tasks import read_task
from tests.evaluate.toy_tasks import pair_rows, sentence_rows, token_rows, write_task


def test_the_columns_tell_the_kind_of_task(tmp_path: Path) -> None:
    words = read_task(write_task(tmp_path / "words", token_rows))
    assert (words.kind, words.labels, words.metric) == ("token", ("B-LOC", "O"), "entity_f1")
    first = words.splits["train"][0]
    assert [words.labels[i] for i in first.target] == token_rows(1)["ner_tags"][0]
    texts = read_task(write_task(tmp_path / "texts", sentence_rows))
    assert (texts.kind, texts.labels, texts.metric) == ("sentence", ("0", "1"), "macro_f1")
    pairs = read_task(write_task(tmp_path / "pairs", pair_rows))
    assert (pairs.kind, pairs.labels, pairs.metric, pairs.regression) == ("pair", (), "spearman", True)
    assert pairs.splits["test"][3].target.tolist() == [pair_rows(8, 32)["score"][3]]
    assert {split: len(rows) for split, rows in pairs.splits.items()} == {"train": 24, "validation": 8, "test": 8}


@pytest.mark.parametrize(
    ("line", "metric"),
    [
        ("Metric: Matthews correlation (MCC); classes are unbalanced.", "mcc"),
        ("Metric: token accuracy.", "accuracy"),
        ("Metric: macro F1. Splits as in the source.", "macro_f1"),
        ("No metric is named.", "macro_f1"),
        ("Metric: Spearman", "macro_f1"),  # does not fit a classification
    ],
)
def test_the_readme_names_the_metric(tmp_path: Path, line: str, metric: str) -> None:
    assert read_task(write_task(tmp_path / "task", readme=f"# A task\n{line}\n")).metric == metric


def test_a_metric_can_be_asked_for(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task")
    assert read_task(folder, "mcc").metric == "mcc"
    with pytest.raises(DataError, match=r"'acuracy' does not fit.*'accuracy'"):
        read_task(folder, "acuracy")
    with pytest.raises(DataError, match="'spearman' does not fit"):
        read_task(folder, "spearman")


def test_fewer_rows_are_the_same_ones_each_time_and_keep_all_labels(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task")
    whole, few, again = read_task(folder), *(read_task(folder, None, {"train": 5, "test": 99}) for _ in range(2))
    assert few.labels == whole.labels
    assert len(few.splits["train"]) == 5 and len(few.splits["test"]) == 8
    assert [row.texts for row in few.splits["train"]] == [row.texts for row in again.splits["train"]]
    assert {row.texts for row in few.splits["train"]} <= {row.texts for row in whole.splits["train"]}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"test": {"text": ["a", "b"], "label": [0, 2]}},
            r"test.parquet, row 1: the label '2' is not in train.parquet",
        ),
        ({"validation": {"text": ["a"]}}, r"validation.parquet: no column 'label', which train.parquet has"),
        ({"train": {"text": ["a", None], "label": [0, 1]}}, r"train.parquet, row 1: 'text' is None"),
        ({"train": {"text": ["a", " "], "label": [0, 1]}}, r"train.parquet, row 1: 'text' is empty"),
        ({"train": {"text": ["a", "b"], "label": [0, None]}}, r"row 1: 'label' is None"),
        ({"train": {"text": ["a", "b"], "score": [0.5, float("nan")]}}, r"row 1: 'score' is nan"),
        ({"train": {"text": ["a", "b"], "label": [1, 1]}}, r"every label is '1'"),
        ({"train": {"text": ["a"], "category": ["x"]}}, r"no column 'label' or 'score' \(columns: text, category\)"),
        ({"train": {"frase": ["a"], "label": [1]}}, r"neither 'tokens', 'text' nor 'sentence1'"),
        ({"train": {"tokens": [["a", "b"], ["c"]], "tags": [["X"], ["Y"]]}}, r"row 0: 2 tokens but 1 labels"),
        ({"train": {"tokens": [["a"]], "label": ["X"]}}, r"0 list columns beside 'tokens'"),
        ({"train": {"text": [], "label": []}}, r"the file has no rows"),
    ],
)
def test_errors_name_the_file_and_the_row(tmp_path: Path, splits: dict, message: str) -> None:
    if "tokens" in splits.get("train", ()):
        splits = dict.fromkeys(("train", "validation", "test"), splits["train"])
    with pytest.raises(DataError, match=message):
        read_task(write_task(tmp_path / "task", **splits))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task")
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"hola", b"ca\xf1a"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": broken, "label": [0, 1]}), folder / "test.parquet")
    with pytest.raises(DataError, match=r"test.parquet: text that is not UTF-8 \(byte 0xf1\)"):
        read_task(folder)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_task(tmp_path / "nowhere")
    folder = write_task(tmp_path / "task")
    (folder / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"test.parquet: not a readable parquet file"):
        read_task(folder)
    (folder / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"test.parquet: not found"):
        read_task(folder)
