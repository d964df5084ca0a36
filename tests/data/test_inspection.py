from __future__ import annotations

import shutil

import pytest

from tbf.data.inspection import format_inspection, format_prepared, inspect_folder
from tbf.data.packing import build_rows
from tbf.data.prepare import prepare_folder
from tbf.data.shards import ShardIndex
from tbf.errors import DataError

from .conftest import OPTIONS, write_jsonl


def test_inspection(tmp_path, shards, texts, tokenizer):
    folder = tmp_path / "p"
    shutil.copytree(shards, folder, ignore=shutil.ignore_patterns("rows"))
    build_rows(ShardIndex.read(folder), 64, 0.1)
    found = inspect_folder(folder, samples=2, check=True)
    tokens = sum(len(ids) for ids in tokenizer.encode_ids(texts))
    assert found.documents == sum(found.lengths.values()) == 300
    assert found.tokens == tokens + 2 * 300
    assert found.text_bytes == sum(len(t.encode()) for t in texts)
    assert found.bytes_per_token == pytest.approx(found.text_bytes / tokens)
    assert found.unknown_rate == 0.0
    assert len(found.samples) == 2
    assert found.samples[0][:40] in " ".join(texts)
    assert found.rows["s64-v0.1"]["train_efficiency"] > 0.95
    text = format_inspection(found)
    for piece in ("300 documents", "bytes a token", "unknown", "duplicates left out 0", "rows s64-v0.1", "> "):
        assert piece in text


def test_inspection_shows_what_cleaning_did(tmp_path, texts, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [*texts[:9], texts[0], ""])
    result = prepare_folder(str(path), tmp_path / "p", tokenizer=tokenizer, options=OPTIONS)
    for text in (format_prepared(result), format_inspection(inspect_folder(tmp_path / "p"))):
        assert "duplicate 1" in text
        assert "empty 1" in text
    assert inspect_folder(tmp_path / "p").duplicates == 1


def test_inspection_of_nothing(tmp_path):
    with pytest.raises(DataError, match=r"index\.json: not found"):
        inspect_folder(tmp_path)
