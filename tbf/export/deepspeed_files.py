"""Reads DeepSpeed checkpoint folders without DeepSpeed (layout of 0.19: ZeRO-1, -2 and -3, any number of ranks).

A folder holds `*_model_states.pt` (module, shapes, counters) and one `*_optim_states.pt` per rank (FP32 masters and
moments). Files are opened with `weights_only=True` and memory-mapped: opening a folder reads no weights, and a
pickle that names anything beyond tensors and the three classes of `ALLOWED_CLASSES` is refused before it can run.

The same weights can be put together in two ways that share neither code nor, for ZeRO-1 and -2, files:
`DeepSpeedCheckpoint.weights` and `DeepSpeedCheckpoint.reference_pieces`.
"""

from __future__ import annotations

import enum
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tbf.errors import CheckpointError, first_line
from tbf.export.stored import StoredTensor, release, stored


class ZeroStage(int, enum.Enum):
    """Stands in for DeepSpeed's enum while a file is read."""

    DISABLED = 0
    OPTIMIZER = 1
    GRADIENTS = 2
    WEIGHTS = 3


class Fragment:
    """Stands in for DeepSpeed's fragment_address (attributes `start`, `numel`)."""


class LossScale:
    """Stands in for DeepSpeed's LossScaler; nothing reads it."""


ALLOWED_CLASSES = (
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScale, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
)

_MODEL_FILE = "mp_rank_00_model_states.pt"
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
_UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


def load_file(path: Path) -> dict[str, Any]:
    """Opens one file, memory-mapped. Raises CheckpointError if it is cut short or names a class that is not allowed."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the checkpoint again, with the files of every rank")
    with torch.serialization.safe_globals(list(ALLOWED_CLASSES)):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except _UNREADABLE as error:
            raise CheckpointError(_why_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a DeepSpeed checkpoint")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        forbidden = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except _UNREADABLE:
        forbidden = []
    if forbidden:
        return (
            f"{path} wants to run code: its pickle names {', '.join(sorted(forbidden)[:4])}; "
            "a DeepSpeed checkpoint needs no such class, so it was not loaded"
        )
    reason = first_line(error)[:120]
    return f"{path} ({path.stat().st_size} bytes) is cut short or damaged: {reason}; copy it again or take another step"


class DeepSpeedCheckpoint:
    """One checkpoint folder, opened for reading.

    Attributes: `stage` (0-3; a folder without optimizer shards counts as 0), `world_size` (ranks), `step`, `version`
    (of DeepSpeed), `aliases` (name of a tied weight -> name under which it is stored).
    Raises CheckpointError when files are missing, damaged, or do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if (self.folder / "offloaded_tensors").is_dir():
            raise CheckpointError(
                f"{self.folder} was saved with the optimizer on NVMe by DeepSpeed's own code: its *_optim_states.pt "
                "hold what happened to lie in swap buffers, not the weights; take a checkpoint that this tbf saved"
            )
        self._models, self._shards = self._open()
        head = self._models[0]
        missing = [key for key in ("module", "param_shapes", "buffer_names") if key not in head]
        if missing:
            raise CheckpointError(f"{self.folder} is no DeepSpeed checkpoint: its model file lacks '{missing[0]}'")
        self.step = int(head.get("global_steps", 0))
        self.version = str(head.get("ds_version", "unknown"))
        self.aliases: dict[str, str] = dict(head.get("shared_params") or {})
        self._groups: list[dict[str, torch.Size]] = [dict(group) for group in head["param_shapes"] or []]
        self._frozen: dict[str, torch.Size] = dict(head.get("frozen_param_shapes") or {})
        self._buffers = {name: head["module"][name] for name in head["buffer_names"] if name in head["module"]}
        self._check_ranks()
        self._check_names()

    @property
    def stage(self) -> int:
        return int(self._optimizer(0)["zero_stage"]) if self._shards else 0

    @property
    def world_size(self) -> int:
        return int(self._models[0].get("dp_world_size", max(len(self._shards), 1)))

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer shards are there, without which nothing can be verified."""
        return bool(self._shards)

    def weights(self) -> dict[str, StoredTensor]:
        """Every weight and persistent buffer once (ties under their stored name), ready to be streamed.

        ZeRO-1 and -2: the `module` of the model file. ZeRO-3: each parameter gathered from the ranks' partitions.
        """
        if self.stage < 3:
            module = self._models[0]["module"]
            return {name: stored(value) for name, value in module.items() if name not in self.aliases}
        weights = {name: stored(value) for name, value in self._buffers.items()}
        for name, shape in self._frozen.items():
            weights[name] = self._lazy(shape, [[model["frozen_param_fragments"][name]] for model in self._models], 0)
        partitions = [self._optimizer(rank)["fp32_flat_groups"] for rank in range(self.world_size)]
        start = 0
        for name, shape in self._trained().items():
            weights[name] = self._lazy(shape, partitions, start)
            start += -(-math.prod(shape) // self.world_size)
        return weights

    def reference_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """The names and values of `weights`, put together another way, to verify them with.

        Yields (name, first, values [n]): the elements from `first` on of the flattened tensor. Each element comes once.

        ZeRO-1 and -2: from the optimizer shards' FP32 masters. ZeRO-3: shard by shard, as the ranks hold them.
        Buffers (and ZeRO-1's frozen weights) exist only once in the files and are given from there.
        """
        if not self.has_masters:
            raise CheckpointError(f"{self.folder} has no *_optim_states.pt to verify against; pass --no-verify")
        for name, value in [*self._buffers.items(), *self._frozen_reference()]:
            yield name, 0, value.flatten()
        yield from self._unflatten_groups() if self.stage < 3 else self._partition_pieces()

    def optimizer_values(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trained parameter's "fp32" master, "exp_avg" or "exp_avg_sq", whole, one at a time."""
        if self.stage < 3:
            shapes = self._trained()
            yield from ((name, flat.view(shapes[name])) for name, _, flat in self._unflatten_groups(key))
            return
        partitions = [self._groups_of(rank, key) for rank in range(self.world_size)]
        start = 0
        for name, shape in self._trained().items():
            yield name, self._lazy(shape, partitions, start).read()
            start += -(-math.prod(shape) // self.world_size)

    @property
    def updates(self) -> int:
        """Optimizer updates behind the moments; skipped steps do not count."""
        return _updates(self._optimizer(0))

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's persistent buffers."""
        return dict(self._buffers)

    # ---------------------------------------------------------------- opening and checking

    def _open(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; give a checkpoint folder or a run folder")
        found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
        for path in self.folder.iterdir():
            if match := _SHARD.fullmatch(path.name):
                found[match[2]][int(match[1])] = path
            elif re.fullmatch(r"mp_rank_(?!00)\d+_model_states\.pt|.*_mp_rank_(?!00)\d+_.*_states\.pt", path.name):
                raise CheckpointError(f"{self.folder} is tensor-parallel ({path.name}); only data-parallel converts")
        whole = self.folder / _MODEL_FILE
        if whole.exists() and found["model"]:
            raise CheckpointError(f"{self.folder} mixes files of ZeRO-2 and ZeRO-3; give each save its own folder")
        if not whole.exists() and not found["model"]:
            raise CheckpointError(f"{self.folder} is no DeepSpeed checkpoint: it holds no *_model_states.pt")
        models = [whole] if whole.exists() else self._all_ranks(found["model"])
        return [load_file(path) for path in models], [load_file(path) for path in self._all_ranks(found["optim"])]

    def _all_ranks(self, files: dict[int, Path]) -> list[Path]:
        gap = next((rank for rank in range(max(files, default=-1) + 1) if rank not in files), None)
        if gap is not None:
            raise self._incomplete(gap, max(files) + 1)
        return [files[rank] for rank in sorted(files)]

    def _incomplete(self, rank: int, world_size: int) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} lacks the files of rank {rank} of {world_size}; collect the shards of every node here"
        )

    def _optimizer(self, rank: int) -> dict[str, Any]:
        return self._shards[rank]["optimizer_state_dict"]

    def _check_ranks(self) -> None:
        for shard in self._shards:
            if "zero_stage" not in shard.get("optimizer_state_dict", {}):
                raise CheckpointError(f"{self.folder} holds an optimizer shard that ZeRO did not write")
        sharded_model = len(self._models) > 1 or not (self.folder / _MODEL_FILE).exists()
        if sharded_model and not self._shards:
            raise CheckpointError(f"{self.folder} is ZeRO-3 without *_optim_states.pt, which hold its weights")
        if self._shards and sharded_model != (self.stage == 3):
            raise CheckpointError(f"{self.folder} mixes files of ZeRO-{self.stage} and of another stage")
        for files in filter(None, (self._shards, self._models if sharded_model else [])):
            if len(files) < self.world_size:
                raise self._incomplete(len(files), self.world_size)
            if len(files) > self.world_size:
                raise CheckpointError(f"{self.folder} holds {len(files)} ranks but was saved by {self.world_size}")
        steps = {int(model.get("global_steps", 0)) for model in self._models}
        updates = {_updates(self._optimizer(rank)) for rank in range(len(self._shards))}
        if len(steps) > 1 or len(updates) > 1:
            mixed = ", ".join(map(str, sorted(steps if len(steps) > 1 else updates)))
            raise CheckpointError(f"{self.folder} mixes shards of different steps ({mixed}); copy one save as a whole")

    def _check_names(self) -> None:
        """What is listed and what is stored must be the same set of names."""
        listed = {*self._trained(), *self._frozen, *self._buffers}
        stored = set(self._models[0]["module"]) - set(self.aliases)
        if self.stage == 1:  # its frozen weights are in the module only
            stored = {name for name in stored if name in listed}
        odd = listed ^ stored
        if odd and self.has_masters:
            raise CheckpointError(f"{self.folder}: '{min(odd)}' is listed but not stored, or stored but not listed")

    # ---------------------------------------------------------------- putting weights together

    def _trained(self) -> dict[str, torch.Size]:
        return {name: torch.Size(shape) for group in self._groups for name, shape in group.items()}

    def _lazy(self, shape: torch.Size, partitions: list[list[torch.Tensor]], start: int) -> StoredTensor:
        """A ZeRO-3 parameter: rank r holds elements [r * width, (r + 1) * width), the last one with padding."""
        dtype = partitions[0][0].dtype
        count = math.prod(shape)
        width = -(-count // self.world_size)

        def read() -> torch.Tensor:
            values = torch.empty(count, dtype=dtype)
            for rank, pieces in enumerate(partitions):
                self._copy_span(pieces, start, values[rank * width : (rank + 1) * width])
            return values.view(shape)

        return StoredTensor(torch.Size(shape), dtype, read)

    def _span(self, pieces: list[torch.Tensor], start: int, count: int) -> torch.Tensor:
        """A copy of the elements [start, start + count) of the vector that the flat `pieces` form end to end."""
        return self._copy_span(pieces, start, torch.empty(count, dtype=pieces[0].dtype))

    def _copy_span(self, pieces: list[torch.Tensor], start: int, out: torch.Tensor) -> torch.Tensor:
        """Fills `out` from element `start` on; returns it."""
        filled = 0
        for piece in pieces:
            if filled < out.numel() and start < piece.numel():
                part = piece.detach()[start : start + out.numel() - filled]
                out[filled : filled + part.numel()] = part
                release(part)
                filled += part.numel()
            start = max(start - piece.numel(), 0)
        if filled < out.numel():
            raise CheckpointError(f"{self.folder}: the optimizer shards hold {out.numel() - filled} values too few")
        return out

    def _frozen_reference(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in self._frozen.items():
            fragments = [model["frozen_param_fragments"][name].flatten() for model in self._models]
            yield name, torch.cat(fragments)[: math.prod(shape)].reshape(shape)
        listed = {*self._trained(), *self._frozen, *self._buffers, *self.aliases}
        for name, value in self._models[0]["module"].items():
            if name not in listed:
                yield name, value

    def _groups_of(self, rank: int, key: str) -> list[torch.Tensor]:
        """The flat groups of a rank, of the masters or of one of their moments, without the end padding of ZeRO-2."""
        optimizer = self._optimizer(rank)
        masters = optimizer["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
        if key == "fp32":
            return list(masters)
        states = _base_states(optimizer)
        if len(states) != len(masters) or any(key not in state for state in states):
            raise CheckpointError(f"{self.folder} holds no '{key}' for every parameter group of rank {rank}")
        return [state[key][: master.numel()] for state, master in zip(states, masters)]

    def _unflatten_groups(self, key: str = "fp32") -> Iterator[tuple[str, int, torch.Tensor]]:
        """ZeRO-1 and -2: a parameter group is one vector, cut into equal partitions whose end padding is not saved."""
        ranks = [self._groups_of(rank, key) for rank in range(self.world_size)]
        paddings = self._optimizer(0).get("param_alignment_paddings")
        for index, group in enumerate(self._groups):
            pieces = [groups[index] for groups in ranks]
            gaps = paddings[index] if paddings else [0] * len(group)
            start = 0
            for (name, shape), gap in zip(group.items(), gaps, strict=True):
                yield name, 0, self._span(pieces, start, math.prod(shape))
                start += math.prod(shape) + gap
            spare = sum(piece.numel() for piece in pieces) - start
            if not 0 <= spare < 2 * self.world_size:
                raise CheckpointError(f"{self.folder}: parameter group {index} has {spare} values left over")

    def _partition_pieces(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """ZeRO-3, shard by shard: a rank's groups, end to end, hold one slice per parameter, filled up at the end."""
        shapes = self._trained()
        widths = [-(-shape.numel() // self.world_size) for shape in shapes.values()]
        for rank in range(self.world_size):
            groups = list(self._optimizer(rank)["fp32_flat_groups"])
            held = sum(group.numel() for group in groups)
            if held != sum(widths):
                raise CheckpointError(f"{self.folder}: rank {rank} holds {held} values, not {sum(widths)}")
            start = 0
            for (name, shape), width in zip(shapes.items(), widths):
                count = min(width, max(shape.numel() - rank * width, 0))
                yield name, rank * width, self._span(groups, start, count)
                start += width


def _updates(optimizer: dict[str, Any]) -> int:
    """Optimizer updates behind a shard; equal on every rank of one save."""
    return next((int(state["step"]) for state in _base_states(optimizer) if "step" in state), 0)


def _base_states(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The wrapped optimizer's state, one entry for each flat group, in their order."""
    base = optimizer.get("base_optimizer_state") or optimizer.get("optimizer_state_dict") or {}
    if not isinstance(base, dict):
        return list(base)
    return [state for _, state in sorted((base.get("state") or {}).items())]
