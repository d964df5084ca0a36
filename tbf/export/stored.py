"""Tensors that are still on disk, and how to let go of them once they have been read."""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on disk; `read()` returns a contiguous copy in memory."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored(value: Tensor) -> StoredTensor:
    """A memory-mapped tensor as a StoredTensor."""

    def read() -> Tensor:
        copy = value.detach().clone(memory_format=torch.contiguous_format)
        release(value)
        return copy

    return StoredTensor(value.shape, value.dtype, read)


def release(tensor: Tensor) -> None:
    """Takes the pages of a memory-mapped tensor out of the process; reading it again brings them back from the file.

    A mapped file counts as memory of the process, page by page as it is read, until it is closed: going through a
    checkpoint would seem to need, and under a memory limit does need, as much memory as the checkpoint has bytes.
    Does nothing to tensors in ordinary memory, and outside Linux. Values written into the mapping are lost.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of its own only
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0 and _is_mapped_file(start, length):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _is_mapped_file(start: int, length: int) -> bool:
    """Whether one file mapping of this process covers [start, start + length)."""
    regions = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
        for line in lines:
            span, _, _, _, inode, *_ = line.split(maxsplit=5)
            first, last = (int(address, 16) for address in span.split("-"))
            regions.append((first, last, inode != "0"))
    at = bisect.bisect_right(regions, start, key=lambda region: region[0]) - 1
    return at >= 0 and regions[at][2] and start + length <= regions[at][1]
