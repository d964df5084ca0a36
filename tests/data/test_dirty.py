"""Every file of a folder of bad input in one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tbf.data.cleaning import CleanOptions
from tbf.data.inspection import format_prepared
from tbf.data.loader import PackedDataset
from tbf.data.plan import PrepareOptions
from tbf.data.sharding import prepare, verify
from tbf.errors import DataError

OPTIONS = PrepareOptions(clean=CleanOptions(), progress=False)
BAD = {
    "all-null.parquet": "no text in it (50 null)",
    "corrupt-bytes.parquet": "not UTF-8",
    "dirty.jsonl": "not JSON",
    "empty-zero-rows.parquet": "no rows",
    "invalid-utf8-in-string-column.parquet": "not UTF-8",
    "jsonl-named.parquet": "not a readable parquet file",
    "no-text-column.parquet": "columns: contenido",
    "not-a-parquet.parquet": "not a readable parquet file",
    "not-utf8.txt": "not UTF-8",
    "text-column-binary-latin1.parquet": "not UTF-8",
    "text-column-wrong-type.parquet": "not text",
    "truncated.parquet": "not a readable parquet file",
    "zero-bytes.parquet": "empty",
}
GOOD = {"dirty-00000.parquet", "dirty-00001-other-schema.parquet"}


@pytest.fixture(scope="module")
def dirty(request) -> Path:
    folder = request.getfixturevalue("shared_data") / "corpus_es_dirty"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set TBF_TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="module")
def result(dirty, tokenizer, tmp_path_factory):
    return prepare(str(dirty), tokenizer, tmp_path_factory.mktemp("dirty") / "p", replace(OPTIONS, processes=2))


def test_bad_files_are_named_with_the_reason(result):
    assert {Path(name).name for name in result.bad_files} == set(BAD)
    for name, reason in result.bad_files.items():
        assert BAD[Path(name).name] in reason, name


def test_good_records_are_kept_and_the_rest_is_counted(result, dirty):
    assert result.complete
    verify(result.folder)
    read = sum(pq.read_metadata(dirty / name).num_rows for name in GOOD)
    assert read == 350
    for kind in ("null", "empty", "too_short", "duplicate", "not_spanish", "control_removed", "nfc_changed", "split",
                 "bad_encoding", "malformed", "missing_key", "wrong_type"):  # fmt: skip
        assert result.counts.get(kind, 0) > 0, kind
    assert result.documents > 200
    text = format_prepared(result)
    assert "not_spanish" in text
    assert text.count("bad file") == len(BAD)


def test_no_document_is_lost_without_a_count(dirty, tokenizer, tmp_path):
    for name in sorted(GOOD):
        one = prepare(str(dirty / name), tokenizer, tmp_path / name, OPTIONS)
        dropped = sum(one.counts.get(kind, 0) for kind in ("null", "empty", "too_short", "not_spanish", "duplicate"))
        more = one.counts.get("split_pieces", 0) - one.counts.get("split", 0)
        assert one.documents + dropped - more == pq.read_metadata(dirty / name).num_rows


def test_rows_can_be_read(result, tokenizer):
    dataset = PackedDataset(result.folder, seq_len=512, tokenizer=tokenizer)
    input_ids, segments = dataset.read(range(dataset.rows_per_epoch))
    assert input_ids.max() < tokenizer.vocab_size
    assert not (input_ids == tokenizer.mask_id).any()  # the literal [MASK] of a document stays text
    assert (segments > 0).mean() > 0.97


@pytest.mark.parametrize("name", sorted(BAD))
def test_strict_refuses_each(dirty, tokenizer, tmp_path, name):
    with pytest.raises(DataError) as caught:
        prepare(str(dirty / name), tokenizer, tmp_path / "p", replace(OPTIONS, strict=True))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_but_bad_files_is_exit_3(dirty, tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("all-null.parquet", "zero-bytes.parquet", "not-utf8.txt"):
        (tmp_path / "in" / name).symlink_to(dirty / name)
    with pytest.raises(DataError, match="no document left") as caught:
        prepare(str(tmp_path / "in"), tokenizer, tmp_path / "p", OPTIONS)
    assert caught.value.exit_code == 3
