from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbf.data.packing import build_rows, cut, pack
from tbf.data.sharding import prepare
from tbf.data.shards import ShardIndex
from tbf.errors import DataError

from .conftest import OPTIONS, write_jsonl


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=200))
def test_pack_places_every_item_once_and_never_overflows(lengths):
    rows = pack(lengths, 64)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert pack(lengths, 64) == rows


def test_pack_is_tight():
    lengths = np.random.default_rng(0).integers(3, 513, 5000).tolist()
    rows = pack(lengths, 512)
    assert sum(lengths) / (len(rows) * 512) > 0.98
    assert pack([512, 300, 212, 300, 212, 100], 512) == [[0], [1, 2], [3, 4], [5]]


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 100), length=st.integers(1, 3000), longest=st.integers(6, 600))
def test_cut_covers_the_document(start, length, longest):
    pieces = cut(start, length, longest)
    assert pieces[0][0] == start
    assert sum(size for _, size in pieces) == length
    assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(pieces))
    assert all(0 < size <= longest for _, size in pieces)
    assert min(size for _, size in pieces) >= min(length, 32, longest // 4)


def test_splits_are_disjoint_complete_and_follow_the_text(shards):
    index = ShardIndex.read(shards)
    rows = build_rows(index, 64, 0.2)
    found = {}
    for split in ("train", "validation"):
        tokens = sum(table.tokens - 2 * table.segments for table in rows.tables[split])
        found[split] = tokens
        assert rows.efficiency(split) > 0.9
    content = index.tokens - 2 * sum(shard.documents for shard in index.shards)
    assert sum(found.values()) == content
    assert 0.1 < found["validation"] / content < 0.3


def test_the_same_text_lands_on_the_same_side_in_any_corpus(tmp_path, tokenizer, texts):
    """Held-out documents stay held out when a corpus is prepared anew in another order with other company."""
    sides = []
    for number, chosen in enumerate([texts[:200], texts[199::-1] + texts[200:]]):
        folder = tmp_path / str(number)
        prepare(str(write_jsonl(tmp_path / f"{number}.jsonl", chosen)), tokenizer, folder, OPTIONS)
        index = ShardIndex.read(folder)
        held = set()
        for shard in index.shards:
            from tbf.data.hashing import mix

            values = np.fromfile(folder / f"{shard.name}.idx", "<u8")[shard.documents + 1 :]
            held |= set(values[mix(values) < np.uint64(0.3 * 2**64)].tolist())
        sides.append(held)
    assert sides[0]
    assert sides[0] < sides[1]


def test_a_small_corpus_still_gets_both_splits(tmp_path, tokenizer, texts):
    prepare(str(write_jsonl(tmp_path / "a.jsonl", texts[:2])), tokenizer, tmp_path / "two", OPTIONS)
    rows = build_rows(ShardIndex.read(tmp_path / "two"), 64, 0.01)
    assert rows.rows("train") > 0
    assert rows.rows("validation") > 0
    prepare(str(write_jsonl(tmp_path / "b.jsonl", texts[:1])), tokenizer, tmp_path / "one", OPTIONS)
    with pytest.raises(DataError, match="more documents"):
        build_rows(ShardIndex.read(tmp_path / "one"), 64, 0.05)
    assert build_rows(ShardIndex.read(tmp_path / "one"), 64, 0.0).rows("validation") == 0


def test_rows_do_not_depend_on_processes(tmp_path, shards):
    files = []
    for processes in (1, 3):
        copy = tmp_path / str(processes)
        shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("rows"))
        rows = build_rows(ShardIndex.read(copy), 128, 0.1, processes=processes)
        files.append({file.name: file.read_bytes() for file in sorted(rows.folder.iterdir())})
    assert files[0] == files[1]


def test_rows_of_other_shards_are_not_taken(tmp_path, tokenizer, texts):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, chosen in zip(folders, (texts[:20], texts[20:60])):
        prepare(str(write_jsonl(tmp_path / f"{folder.name}.jsonl", chosen)), tokenizer, folder, OPTIONS)
    expected = build_rows(ShardIndex.read(folders[0]), 64, 0.1).rows("train")
    foreign = build_rows(ShardIndex.read(folders[1]), 64, 0.1)
    assert foreign.rows("train") != expected
    shutil.copytree(folders[1] / "rows", folders[0] / "rows", dirs_exist_ok=True)
    assert build_rows(ShardIndex.read(folders[0]), 64, 0.1).rows("train") == expected
