"""What ZeRO-Infinity keeps on NVMe, as tensors: for checkpoints, which DeepSpeed 0.19.8 saves and loads wrongly.

Its `state_dict` takes the tensors of a swapped group as they are, which by then point into buffers that other groups
have used since, and its load leaves out Adam's step and the groups too small to swap. The files of the swapped groups
are right, though: here they are mapped into memory. The test of this file tells when it may go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SUFFIX = ".tensor.swp"


class SwappedGroup:
    """One sub-group's files, mapped: FP32 masters as `fp32`, moments by their names in the optimizer's state.

    `moments` are made where a fresh engine, which has taken no step, lacks them yet.
    """

    def __init__(self, optimizer: Any, index: int, moments: Sequence[str] = ()) -> None:
        flat, swapper = optimizer.fp32_partitioned_groups_flat[index], optimizer.optimizer_swapper
        swapped = swapper.swap_params_info[flat.ds_id]
        size = swapped.numel()
        paths = {_key(Path(path), flat.ds_id): Path(path) for path in swapped.get_swap_paths()}
        state = optimizer.optimizer.state[flat]
        for key in set(moments) - set(paths):
            paths[key] = Path(swapped.swap_folder) / f"{key}-{flat.ds_id}{_SUFFIX}"
            with paths[key].open("wb") as file:
                file.truncate(4 * swapper._io_aligned_numel(size))
            state[key] = torch.zeros(1).expand(size)  # takes no room; DeepSpeed finds it there, its file by the name
        self._maps = {key: np.memmap(path, np.float32, "r+", shape=(size,)) for key, path in paths.items()}
        self.tensors = {key: torch.from_numpy(mapped) for key, mapped in self._maps.items()}

    def flush(self) -> None:
        """Puts changes where DeepSpeed, which reads past the page cache, finds them."""
        for mapped in self._maps.values():
            mapped.flush()


def _key(path: Path, group: str) -> str:
    return path.name.removesuffix(_SUFFIX).removesuffix(group).rstrip("-") or "fp32"


def is_swapped(optimizer: Any, index: int) -> bool:
    """Whether sub-group `index` of a ZeRO-3 optimizer has its state on NVMe."""
    return optimizer._swappable_optimizer_subgroup(index)


def swaps(engine: Any) -> bool:
    """Whether DeepSpeed keeps weights or optimizer state of this engine on NVMe."""
    optimizer = engine.optimizer
    return getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False)


@contextlib.contextmanager
def saved_from_disk(engine: Any) -> Iterator[None]:
    """Inside the block, `engine` saves what its swap files hold, and no second copy of them beside."""
    if not getattr(engine.optimizer, "swap_optimizer", False):
        yield
        return
    engine.optimizer.state_dict = lambda: _state_dict(engine.optimizer)
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.optimizer.state_dict, engine.zero_nvme_offload_optimizer


def _state_dict(optimizer: Any) -> dict[str, Any]:
    state = type(optimizer).state_dict(optimizer)
    masters, inner = list(state["fp32_flat_groups"]), dict(state["optimizer_state_dict"])
    inner["state"] = dict(inner["state"])
    for index in range(len(masters)):
        if is_swapped(optimizer, index):
            tensors = SwappedGroup(optimizer, index).tensors
            masters[index] = tensors.pop("fp32")
            inner["state"][index] = {**inner["state"].get(index, {}), **tensors}
    return {**state, "fp32_flat_groups": masters, "optimizer_state_dict": inner}
