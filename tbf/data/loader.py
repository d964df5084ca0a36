"""Batches for training: optimizer steps of masked rows for one rank, prepared ahead by worker processes.

Shapes: B rows of a micro-batch, T tokens a row, M slots for masked positions.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from tbf.data.dataset import PackedDataset
from tbf.data.masking import EMPTY, MaskSpec, mask_rows

__all__ = ["BatchLoader", "EvaluationRows", "PackedDataset"]


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
            generator=torch.Generator(),  # else each start draws from the state that a resumed run's dropout continues
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
        # A moving rate stays at its start here: losses of all steps must be comparable, also with those of runs that
        # are longer, that end at another rate, or whose rate does not move.
        self._batches = _MicroBatches(dataset, replace(mask, end_rate=None), micro_batch)

    def __len__(self) -> int:
        """Micro-batches per rank."""
        return -(-self.rows // (self.micro_batch * self.world_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(len(self)):
            first = (number * self.world_size + self.rank) * self.micro_batch
            batch = self._batches[first, 0]
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
