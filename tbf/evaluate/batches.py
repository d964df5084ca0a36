"""Rows of unlike length in batches.

Shapes: `B` rows of a batch, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of all rows in batches of `size`, longest first: little padding, and a batch too large fails at once."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids side by side: (ids [B, T], mask [B, T], 1 at tokens), both int64."""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask
