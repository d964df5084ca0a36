"""Packs documents into rows of a fixed number of tokens, ahead of training and independently of it.

    DIR/rows/s512-v0.05/shard-00000.train.rows   uint32 first segment of each row [rows + 1],
                                                 then (first token, tokens) uint32 [segments, 2]
    DIR/rows/s512-v0.05/rows.json                counts, written last

A segment is a document's content without its [CLS] and [SEP], which every segment gets anew in its row. Whole documents
stay together where they fit; longer ones are cut into full rows and a rest that is packed like a short document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tbf.data.files import folder_lock, make_folder, read_json, write_bytes, write_json
from tbf.data.hashing import mix
from tbf.data.shards import ShardIndex, ShardInfo, read_documents
from tbf.data.workers import run_jobs
from tbf.errors import DataError

SPLITS = ("train", "validation")
SHORTEST_REST = 32
"""Content tokens: a shorter rest of a cut document borrows from the piece before."""


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Groups items into rows: each row starts with the longest item left and takes the longest that still fit.

    Best-fit decreasing with one bucket per length; a bit set of the filled buckets finds the next item at once.

    Returns:
        rows as ascending item numbers; every item is in exactly one row and no row exceeds `capacity`.
    """
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]
    for item in range(len(lengths) - 1, -1, -1):  # reversed, so that pop() takes the earliest
        buckets[lengths[item]].append(item)
    filled = sum(1 << length for length, items in enumerate(buckets) if items)
    rows = []
    while filled:
        room = capacity
        row: list[int] = []
        while fits := filled & ((2 << room) - 1):
            length = fits.bit_length() - 1
            items = buckets[length]
            row.append(items.pop())
            room -= length
            if not items:
                filled &= ~(1 << length)
        rows.append(sorted(row))
    return rows


def cut(start: int, length: int, longest: int) -> list[tuple[int, int]]:
    """Cuts `length` content tokens from `start` into pieces (start, tokens) of at most `longest`."""
    if length <= longest:
        return [(start, length)]
    full, rest = divmod(length, longest)
    sizes = [longest] * full + ([rest] if rest else [])
    least = min(SHORTEST_REST, longest // 4)
    if 0 < rest < least:
        sizes[-2:] = [longest - (least - rest), least]
    pieces = []
    for size in sizes:
        pieces.append((start, size))
        start += size
    return pieces


@dataclass(frozen=True)
class RowTable:
    """The rows of one split of one shard."""

    shard: str
    source: str
    rows: int
    segments: int
    tokens: int
    """Filled positions, [CLS] and [SEP] included."""


@dataclass(frozen=True)
class RowIndex:
    """The rows of a prepared corpus for one row length."""

    folder: Path
    seq_len: int
    validation_share: float
    tables: dict[str, tuple[RowTable, ...]]
    """Per split."""

    def rows(self, split: str) -> int:
        return sum(table.rows for table in self.tables[split])

    def efficiency(self, split: str) -> float:
        """Share of the positions of all rows that hold a token."""
        positions = self.rows(split) * self.seq_len
        return sum(table.tokens for table in self.tables[split]) / positions if positions else 0.0


def rows_folder(folder: Path, seq_len: int, validation_share: float) -> Path:
    return folder / "rows" / f"s{seq_len}-v{validation_share:g}"


def read_rows(index: ShardIndex, seq_len: int, validation_share: float) -> RowIndex | None:
    """The rows packed before, or None when there are none for these shards."""
    folder = rows_folder(index.folder, seq_len, validation_share)
    if not (folder / "rows.json").exists():
        return None
    value = read_json(folder / "rows.json", f"delete {folder}: it is made anew")
    if value.get("key") != index.key:
        return None
    tables = {split: tuple(RowTable(**table) for table in value["tables"][split]) for split in SPLITS}
    return RowIndex(folder, seq_len, validation_share, tables)


def build_rows(index: ShardIndex, seq_len: int, validation_share: float, *, processes: int = 1) -> RowIndex:
    """Packs every shard for rows of `seq_len` tokens, or returns what was packed before.

    Args:
        validation_share: share of the documents that go to the validation split, chosen by the hash of their text;
            above 0 it gets at least one document.

    Raises:
        DataError: too few documents for the splits, or the folder cannot be written.
    """
    if found := read_rows(index, seq_len, validation_share):
        return found
    with folder_lock(index.folder, "packing rows", name="rows"):
        if found := read_rows(index, seq_len, validation_share):
            return found
        if index.documents < (2 if validation_share else 1):
            raise DataError(
                f"{index.folder}: {index.documents} document(s) cannot give rows to train on and rows to validate on; "
                "give a source with more documents (a .txt file may hold one a line: documents=line)"
            )
        threshold = _threshold(index, validation_share)
        folder = make_folder(rows_folder(index.folder, seq_len, validation_share))

        def work(shard: ShardInfo, report: Callable[[Any], None]) -> list[RowTable]:
            return _pack_shard(index, shard, folder, seq_len, threshold)

        done = {shard.name: made for shard, made in run_jobs(iter(index.shards), work, processes=processes)}
        tables = {split: tuple(done[s.name][i] for s in index.shards) for i, split in enumerate(SPLITS)}
        value = {
            "key": index.key,
            "tables": {split: [vars(table) for table in tables[split]] for split in SPLITS},
        }
        write_json(folder / "rows.json", value)
        return RowIndex(folder, seq_len, validation_share, tables)


def _kept(index: ShardIndex, shard: ShardInfo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first token, tokens, place in the split order) of the shard's documents that are no repetitions."""
    offsets, hashes = read_documents(index.folder, shard)
    offsets = offsets.astype(np.int64)
    keep = np.ones(shard.documents, bool)
    keep[index.duplicates(shard)] = False
    return offsets[:-1][keep], np.diff(offsets)[keep], mix(hashes[keep])


def _threshold(index: ShardIndex, validation_share: float) -> int:
    """Documents whose place is below this are held out: the wanted share, at least one and never all."""
    if not validation_share:
        return 0
    threshold = int(validation_share * 2**64)
    places = [_kept(index, shard)[2] for shard in index.shards] if index.documents < 1000 else []
    if not places:  # so many documents that the share cannot come out empty or full
        return threshold
    ordered = np.sort(np.concatenate(places))
    held = min(max(int(np.searchsorted(ordered, np.uint64(threshold))), 1), len(ordered) - 1)
    return int(ordered[held - 1]) + 1


def _pack_shard(index: ShardIndex, shard: ShardInfo, folder: Path, seq_len: int, threshold: int) -> list[RowTable]:
    starts, sizes, places = _kept(index, shard)
    held = places < np.uint64(min(threshold, 2**64 - 1))
    tables = []
    for split, chosen in zip(SPLITS, (~held, held)):
        pieces: list[tuple[int, int]] = []
        for start, size in zip(starts[chosen].tolist(), sizes[chosen].tolist()):
            pieces += cut(start + 1, size - 2, seq_len - 2)
        rows = pack([size + 2 for _, size in pieces], seq_len)
        firsts = np.cumsum([0] + [len(row) for row in rows]).astype("<u4")
        segments = np.array([pieces[item] for row in rows for item in row], "<u4").reshape(-1, 2)
        write_bytes(folder / f"{shard.name}.{split}.rows", firsts.tobytes() + segments.tobytes(), durable=False)
        tokens = int(segments[:, 1].sum(dtype=np.int64)) + 2 * len(segments)
        tables.append(RowTable(shard.name, shard.source, len(rows), len(segments), tokens))
    return tables
