"""Rows for training: any row of any epoch in constant time, the same for any number of ranks, workers and nodes.

Shapes: B rows of a micro-batch, T tokens a row, M slots for masked positions.

One integer, the number of rows consumed so far, says where a run is. It is hashed into a row: epochs are random
permutations that are computed (never stored), and a mixture deals its sources out by their shares.
"""

from __future__ import annotations

import bisect
import os
import signal
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tbf.data.hashing import key, permute
from tbf.data.masking import EMPTY, MaskSpec, mask_rows
from tbf.data.packing import SPLITS, RowIndex, RowTable, build_rows
from tbf.data.shards import PREPARE_AGAIN, Shard, ShardIndex
from tbf.data.tokenizer import SPECIAL_TOKENS, SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError, nearest

OPEN_SHARDS = 128
"""Shards that a process keeps open (two files each)."""
_CLS, _SEP = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
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


class PackedDataset:
    """The rows of one split of a prepared corpus.

    Args:
        shard_dir: a folder made by `prepare`.
        seq_len: tokens a row (T).
        seed: of the order of the rows.
        split: `train` or `validation`. Validation rows come in one fixed order with one fixed mask each.
        validation_share: share of the documents held out, by the hash of their text; None: as recorded.
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
        validation_share: float | None = None,
        tokenizer: SpanishSPMTokenizer | None = None,
        processes: int = 1,
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split={split!r} is unknown; {nearest(split, SPLITS)}")
        self.index = ShardIndex.read(shard_dir)
        if tokenizer is not None:
            self.index.check_tokenizer(tokenizer)
        self.seq_len, self.seed, self.split = seq_len, seed, split
        if validation_share is None:
            validation_share = self.index.validation_share
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
        self._open: OrderedDict[str, tuple[Shard, int]] = OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return self.rows_per_epoch

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
            shard, segments = self._segments(row)
            at = 0
            for segment, (start, tokens) in enumerate(segments, 1):
                end = at + tokens + 2
                input_ids[number, at] = _CLS
                input_ids[number, at + 1 : end - 1] = shard.read(start, tokens)
                input_ids[number, end - 1] = _SEP
                segment_ids[number, at:end] = segment
                at = end
        return input_ids, segment_ids

    def row(self, position: int) -> dict[str, Any]:
        """The row at a global position: input_ids int64 [T], segment_ids int64 [T], and the epoch and row number."""
        epochs, rows = self.locate([position])
        input_ids, segment_ids = self.read(rows)
        return {"input_ids": input_ids[0], "segment_ids": segment_ids[0], "epoch": int(epochs[0]), "row": int(rows[0])}

    def _segments(self, row: int) -> tuple[Shard, list[list[int]]]:
        source = next(s for s in reversed(self._sources) if s.first <= row)
        inside = row - source.first
        which = bisect.bisect_right(source.ends, inside)
        table = source.tables[which]
        inside -= source.ends[which] - table.rows
        shard, file = self._opened(table.shard)
        first, last = np.frombuffer(os.pread(file, 8, 4 * inside), "<u4").tolist()
        begin = 4 * (table.rows + 1) + 8 * first
        data = os.pread(file, 8 * (last - first), begin)
        return shard, np.frombuffer(data, "<u4").reshape(-1, 2).tolist()

    def _opened(self, name: str) -> tuple[Shard, int]:
        if self._owner != os.getpid():  # after a fork: positions are shared with the parent only where it is harmless
            self._open, self._owner = OrderedDict(), os.getpid()
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self.row_index.folder / f"{name}.{self.split}.rows"
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None
        self._open[name] = (Shard(self.index.folder, name, self.index.dtype), file)
        if len(self._open) > OPEN_SHARDS:
            _, (shard, old) = self._open.popitem(last=False)
            shard.close()
            os.close(old)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class _MicroBatches(torch.utils.data.Dataset):
    """Micro-batches by the position of their first row."""

    def __init__(self, dataset: PackedDataset, mask: MaskSpec, rows: int) -> None:
        self.dataset, self.mask, self.rows = dataset, mask, rows

    def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor]:
        first, step_position = item
        epochs, rows = self.dataset.locate(np.arange(first, first + self.rows))
        input_ids, segment_ids = self.dataset.read(rows)
        inputs, positions, labels = mask_rows(input_ids, segment_ids, epochs, rows, self.mask, position=step_position)
        return {
            "input_ids": torch.from_numpy(inputs),
            "segment_ids": torch.from_numpy(segment_ids),
            "masked_positions": torch.from_numpy(positions),
            "masked_labels": torch.from_numpy(labels),
        }


class BatchLoader:
    """Yields optimizer steps for ever: each a list of `accumulation` micro-batches of this rank.

    A step takes `accumulation * world_size * micro_batch` global rows from `cursor`; micro-batch `a` of rank `r` takes
    those from `cursor + (a * world_size + r) * micro_batch`. Tensors are int64 on the CPU: input_ids and segment_ids
    [B, T], masked_positions and masked_labels [B, M] (-100 where a slot is empty).

    Args:
        cursor: rows consumed so far; the attribute of that name moves on when a step is handed out.
        num_workers: processes that prepare steps ahead; 0 prepares them here. The rows are the same.
        pin_memory: give page-locked tensors (needs a GPU).
    """

    def __init__(
        self,
        dataset: PackedDataset,
        mask: MaskSpec,
        *,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        cursor: int = 0,
        num_workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.mask = dataset, mask
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.rank, self.world_size = rank, world_size
        self.cursor = cursor
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self._iterator: Iterator[dict[str, torch.Tensor]] | None = None

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def epoch(self) -> float:
        """Epochs consumed so far, with fraction."""
        return self.cursor / self.dataset.rows_per_epoch

    def _positions(self) -> Iterator[tuple[int, int]]:
        cursor = self.cursor
        while True:
            for micro_step in range(self.accumulation):
                yield cursor + (micro_step * self.world_size + self.rank) * self.micro_batch, cursor
            cursor += self.rows_per_step

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        self.close()
        workers = self.num_workers
        batches = torch.utils.data.DataLoader(
            _MicroBatches(self.dataset, self.mask, self.micro_batch),
            batch_size=None,
            sampler=self._positions(),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=max(self.prefetch, 2 * self.accumulation) if workers else None,
            worker_init_fn=_start_worker if workers else None,
            multiprocessing_context="fork" if workers else None,
            pin_memory=self.pin_memory,
        )
        self._iterator = iter(batches)
        try:
            while True:
                step = [next(self._iterator) for _ in range(self.accumulation)]
                self.cursor += self.rows_per_step
                yield step
        finally:
            self.close()

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [process.pid for process in getattr(self._iterator, "_workers", [])]

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator = None


class EvaluationRows:
    """The first `rows` held-out rows, each exactly once over all ranks, in micro-batches as `BatchLoader` gives them.

    Every rank gets the same number of micro-batches, as collectives need; where rows run out they are all padding and
    carry no label. Iterating again gives the same tensors.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        mask: MaskSpec,
        *,
        rows: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rows = min(rows, dataset.rows_per_epoch)
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        # The rate of a moving schedule is the one at its end: losses of different steps must be comparable.
        self._batches = _MicroBatches(dataset, mask, micro_batch)
        self._mask_position = mask.end_row

    def __len__(self) -> int:
        """Micro-batches per rank."""
        return -(-self.rows // (self.micro_batch * self.world_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(len(self)):
            first = (number * self.world_size + self.rank) * self.micro_batch
            batch = self._batches[first, self._mask_position]
            missing = torch.arange(first, first + self.micro_batch) >= self.rows
            batch["input_ids"][missing] = 0
            batch["segment_ids"][missing] = 0
            batch["masked_positions"][missing] = 0
            batch["masked_labels"][missing] = EMPTY
            yield batch


def _start_worker(_: int) -> None:
    # A signal to the process group is for the trainer, which still needs these batches for its last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
