"""State on an NVMe disk (ZeRO-Infinity): is there room for it, and can DeepSpeed read it into the right place?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from tbf.errors import ConfigError, HardwareError
from tbf.planning.engine_state import on_disk, share_of, shares_of
from tbf.train.ds_keys import nvme_folders

ALIGNED = 256
"""Elements of FP32 between two addresses that disks with blocks of 512 bytes read to: DeepSpeed's own 1,024 bytes."""
SMALLEST_SWAPPED = 2**20
"""Bytes of a tensor from which on DeepSpeed moves it to the disk, unless `aio.block_size` is more."""
_OF_A_MODULE = 4
"""Weights that a module has itself, at most."""


def check_nvme(config: Mapping[str, Any], groups: Sequence[Sequence[int]], ranks: int) -> None:
    """`groups`: elements of the parameters, by group and in the order of the optimizer.

    Raises HardwareError when a folder for NVMe offload can't be written or hasn't room for the state of the model
    (master weights, two moments and gradients, and the weights themselves, 20 bytes a parameter), and ConfigError when
    the buffers through which weights come from the disk are too small or too few: DeepSpeed would die in a step.
    """
    total = sum(map(sum, groups))
    for folder in nvme_folders(config):
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise HardwareError(f"nvme_path {folder} is no folder that can be written; create it on the NVMe disk")
        free, needed = shutil.disk_usage(folder).free, 20 * total
        if free < needed:
            raise HardwareError(
                f"nvme_path {folder} has {free / 1e9:.1f} GB free, but {total:,} parameters need up to "
                f"{needed / 1e9:.1f} GB there; free some, or offload to host RAM (p40_zero3.json)"
            )
    zero = config.get("zero_optimization", {})
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        _check_buffers(zero, groups, ranks, _swapped_from(config))


def _check_buffers(zero: Mapping[str, Any], groups: Sequence[Sequence[int]], ranks: int, swapped_from: int) -> None:
    block = zero["offload_param"]
    size, count = int(block.get("buffer_size", 10**8)), int(block.get("buffer_count", 5))
    largest = max(share_of(size, ranks) for group in groups for size in group)
    if largest > size and largest >= swapped_from:
        raise ConfigError(
            f"offload_param.buffer_size is {size:,}, but the largest parameter takes {largest:,} elements of a "
            f"rank; set it to {largest} or more"
        )
    kept, swapped = int(block.get("max_in_cpu", 10**9)), []
    for group in groups:
        limit = int(zero.get("sub_group_size", 10**9))
        swapped += [size for size in on_disk(group, limit, ranks, kept) if share_of(size, ranks) >= swapped_from]
        kept = max(0, kept - shares_of(group, ranks))
    live = int(zero.get("stage3_max_live_parameters", 10**9)) + int(zero.get("stage3_prefetch_bucket_size", 5 * 10**7))
    room = max(live, int(zero.get("stage3_max_reuse_distance", 10**9)))  # what is used again so soon is not let go of
    at_once = min(len(swapped), sum(end <= room for end in accumulate(sorted(swapped))) + _OF_A_MODULE)
    if at_once > count:
        raise ConfigError(
            f"offload_param.buffer_count is {count}, but up to {at_once} weights may come from the disk at once; set "
            f"it to {at_once}, or stage3_max_live_parameters, stage3_max_reuse_distance and "
            "stage3_prefetch_bucket_size to 0, which gathers one module's weights at a time"
        )


def align_groups(groups: Sequence[dict[str, Any]], config: Mapping[str, Any], ranks: int) -> None:
    """Puts the parameters of each group into an order in which DeepSpeed can read their gradients back from a disk.

    It reads a gradient straight to its parameter's place in a sub-group's buffer. After parameters of odd sizes that is
    an address to which many disks do not write, and DeepSpeed 0.19.8 does not look at what became of a read: the
    optimizer then takes for a gradient what the buffer held before (tests/train/test_nvme.py tells when this may go).
    So the odd ones come last. Without the optimizer on NVMe the order stays, on which checkpoints depend.

    Raises ConfigError when no order helps: with 3 ranks, say, no weight's share has an even size.
    """
    zero = config.get("zero_optimization", {})
    if (zero.get("offload_optimizer") or {}).get("device") != "nvme":
        return
    swapped = _swapped_from(config)
    for group in groups:
        group["params"] = sorted(group["params"], key=lambda weight: share_of(weight.numel(), ranks) % ALIGNED > 0)
        offset = 0
        for parameter in group["params"]:
            share = share_of(parameter.numel(), ranks)
            if share >= swapped and offset % ALIGNED:
                raise ConfigError(
                    f"offload_optimizer.device nvme: on {ranks} ranks a weight of {tuple(parameter.shape)} is cut into "
                    f"shares of {share:,} elements, no multiple of {ALIGNED}, which DeepSpeed cannot read back from "
                    "every disk; use a number of ranks that divides the widths of the model, or offload the optimizer "
                    "to host RAM (p40_zero3.json)"
                )
            offset = offset + share if offset + share < zero.get("sub_group_size", 10**9) else 0


def _swapped_from(config: Mapping[str, Any]) -> int:
    """Elements of FP32 from which on DeepSpeed moves a tensor."""
    return max(SMALLEST_SWAPPED, config.get("aio", {}).get("block_size", SMALLEST_SWAPPED)) // 4
