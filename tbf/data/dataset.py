"""Any row of any epoch in constant time, the same for any number of ranks, workers and nodes.

Shapes: N rows, T tokens a row.

One integer, the number of rows consumed so far, says where a run is. It is hashed into a row: epochs are random
permutations that are computed (never stored), and a mixture deals its sources out by their shares.
"""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from tbf.data.files import fingerprint
from tbf.data.hashing import key, permute
from tbf.data.packing import SPLITS, RowIndex, RowTable, build_rows
from tbf.data.ramdisk import recorded_copy
from tbf.data.shards import FlatFile, ShardIndex
from tbf.data.tokenizer import SPECIAL_TOKENS, SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError, nearest

OPEN_SHARDS = 128
"""Shards that a process keeps open (two files each)."""
_CLS, _SEP = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
_ROWS_DTYPE = np.dtype("<u4")
_ORDER, _DEAL = 101, 102  # names of the permutations


class _Rows:
    """The rows of one source: where each starts, over all its shards."""

    def __init__(self, name: str, weight: float | None, first: int, tables: list[RowTable]) -> None:
        self.name, self.weight = name, weight
        self.first = first
        """Number of its first row among those of all sources."""
        self.tables = tables
        self.ends = np.cumsum([table.rows for table in tables]).tolist()
        self.count = self.ends[-1] if self.ends else 0


class _OpenFiles:
    """The (tokens, rows) files of the shards used last, of the copy on a RAM disk where there is one."""

    def __init__(self, index: ShardIndex, rows_name: str, split: str) -> None:
        self.index, self.rows_name, self.split = index, rows_name, split
        self.copy = recorded_copy(index.folder, index.key)
        self._open: OrderedDict[str, tuple[FlatFile, FlatFile]] = OrderedDict()
        self._owner = os.getpid()

    def get(self, shard: str) -> tuple[FlatFile, FlatFile]:
        if self._owner != os.getpid():  # after a fork
            self._open, self._owner = OrderedDict(), os.getpid()
        paths = self._paths(shard) if self.copy or shard not in self._open else None
        if shard in self._open:
            files = self._open[shard]
            if paths is None or paths == (files[0].path, files[1].path):
                self._open.move_to_end(shard)
                return files
            self._close(shard)  # by now there is a copy in memory
        assert paths
        self._open[shard] = (FlatFile(paths[0], self.index.dtype), FlatFile(paths[1], _ROWS_DTYPE))
        if len(self._open) > OPEN_SHARDS:
            self._close(next(iter(self._open)))
        return self._open[shard]

    def _paths(self, shard: str) -> tuple[Path, Path]:
        names = f"{shard}.bin", f"rows/{self.rows_name}/{shard}.{self.split}.rows"
        where = self.copy.path if self.copy else self.index.folder.joinpath
        return where(names[0]), where(names[1])

    def _close(self, shard: str) -> None:
        for file in self._open.pop(shard):
            file.close()


class PackedDataset:
    """The rows of one split of a prepared corpus.

    Args:
        shard_dir: a folder made by `prepare`.
        seq_len: tokens a row (T).
        seed: of the order of the rows.
        split: `train` or `validation`. Validation rows come in one fixed order with one fixed mask each.
        validation_share: share of the documents held out, by the hash of their text.
        tokenizer: when given, must be the one that made the shards.

    Raises:
        DataError: missing, damaged or foreign shards, or too few documents.
    """

    def __init__(
        self,
        shard_dir: str | Path,
        *,
        seq_len: int,
        seed: int = 0,
        split: str = "train",
        validation_share: float = 0.05,
        tokenizer: SpanishSPMTokenizer | None = None,
        processes: int = 1,
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split={split!r} is unknown; {nearest(split, SPLITS)}")
        self.index = ShardIndex.read(shard_dir)
        if tokenizer is not None:
            self.index.check_tokenizer(tokenizer)
        self.seq_len, self.seed, self.split = seq_len, seed, split
        self.row_index: RowIndex = build_rows(self.index, seq_len, validation_share, processes=processes)
        self._sources: list[_Rows] = []
        first = 0
        for source in self.index.sources:
            tables = [t for t in self.row_index.tables[split] if t.source == source["name"] and t.rows]
            self._sources.append(_Rows(source["name"], source["weight"], first, tables))
            first += self._sources[-1].count
        if not first:
            raise DataError(
                f"{self.index.folder}: no {split} rows of {seq_len} tokens; give more text or another validation share "
                f"(now {validation_share:g})"
            )
        self.rows_per_epoch = first
        self._quota = self._deal(first)
        self._files = _OpenFiles(self.index, self.row_index.folder.name, split)

    def __len__(self) -> int:
        return self.rows_per_epoch

    @property
    def corpus(self) -> str:
        """Changes when any token or document does, or the share of a source in a mixture."""
        return fingerprint([self.index.key, [source["weight"] for source in self.index.sources]], 64)

    @property
    def packing_efficiency(self) -> float:
        """Share of the positions of all rows of this split that hold a token."""
        return self.row_index.efficiency(self.split)

    def _deal(self, rows: int) -> list[int]:
        """Rows that each source gives to an epoch: all of its own, or its share of a mixture."""
        if any(source.weight is None for source in self._sources):
            return [source.count for source in self._sources]
        weights = [source.weight or 0.0 for source in self._sources]
        for source in self._sources:
            if not source.count:
                raise DataError(f"{self.index.folder}: source {source.name!r} has no {self.split} rows; take it out")
        quota = [max(1, int(rows * weight)) for weight in weights]
        quota[int(np.argmax(weights))] += rows - sum(quota)
        return quota

    def locate(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        """(epoch of its source, row number) of global positions, integers [N]."""
        positions = np.asarray(positions, np.int64)
        if self.split == "validation":
            positions = positions % self.rows_per_epoch
        epochs, places = np.divmod(positions, self.rows_per_epoch)
        if len(self._sources) > 1:
            places = permute(places, self.rows_per_epoch, key(self.seed, epochs, _DEAL))
        source_epochs, rows = np.empty_like(places), np.empty_like(places)
        begin = 0
        for source, quota in zip(self._sources, self._quota):
            mine = (places >= begin) & (places < begin + quota)
            if mine.any():
                turn, inside = np.divmod(epochs[mine] * quota + places[mine] - begin, source.count)
                order = key(self.seed, turn, _ORDER, source.first)
                source_epochs[mine] = turn
                rows[mine] = source.first + permute(inside, source.count, order)
            begin += quota
        return source_epochs, rows

    def read(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and segment_ids, int64 [N, T], of row numbers [N]; segments count from 1, 0 is padding."""
        rows = np.asarray(rows).tolist()
        input_ids = np.zeros((len(rows), self.seq_len), np.int64)
        segment_ids = np.zeros((len(rows), self.seq_len), np.int64)
        for number, row in enumerate(rows):
            tokens_file, segments = self._segments(row)
            at = 0
            for segment, (start, tokens) in enumerate(segments, 1):
                end = at + tokens + 2
                input_ids[number, at] = _CLS
                input_ids[number, at + 1 : end - 1] = tokens_file.read(start, tokens)
                input_ids[number, end - 1] = _SEP
                segment_ids[number, at:end] = segment
                at = end
        return input_ids, segment_ids

    def row(self, position: int) -> dict[str, Any]:
        """The row at a global position: input_ids int64 [T], segment_ids int64 [T], and the epoch and row number."""
        epochs, rows = self.locate([position])
        input_ids, segment_ids = self.read(rows)
        return {"input_ids": input_ids[0], "segment_ids": segment_ids[0], "epoch": int(epochs[0]), "row": int(rows[0])}

    def _segments(self, row: int) -> tuple[FlatFile, list[list[int]]]:
        source = next(s for s in reversed(self._sources) if s.first <= row)
        inside = row - source.first
        which = bisect.bisect_right(source.ends, inside)
        table = source.tables[which]
        inside -= source.ends[which] - table.rows
        tokens, rows = self._files.get(table.shard)
        first, last = rows.read(inside, 2).tolist()
        return tokens, rows.read(table.rows + 1 + 2 * first, 2 * (last - first)).reshape(-1, 2).tolist()
