"""Loads a checkpoint by parameter names: into an engine of other ranks, ZeRO stage, optimizer class or parameter order,
or one with state on NVMe.

DeepSpeed's universal checkpoints cover other ranks only, convert through files written beside the checkpoint, and read
every one of them with pickle. Here each parameter's FP32 weight and Adam moments are put together from the shards by
the same safe reader that exports use, one parameter at a time, and every rank copies its part into its own partitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tbf.errors import CheckpointError
from tbf.export.deepspeed_files import DeepSpeedCheckpoint
from tbf.model.bitlinear import invalidate_ternary
from tbf.train.deepspeed_io import replay_bias_correction
from tbf.train.swapped import SwappedGroup, is_swapped

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Place(NamedTuple):
    """Where this rank keeps its part of one parameter: `count` elements, from `source` of the whole, flattened."""

    group: int
    start: int
    source: int
    count: int


def load_reshaped(engine: Any, folder: Path) -> None:
    """Fills a fresh engine's weights, masters, moments and counters. Collective; reads every shard on every rank.

    Raises CheckpointError when the checkpoint holds other parameters than the engine or lacks their moments.
    """
    checkpoint = DeepSpeedCheckpoint(folder)
    optimizer, partitioned = engine.optimizer, int(engine.zero_optimization_stage()) == 3
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    names = {id(parameter): name for name, parameter in parameters.items()}
    if partitioned:
        optimizer.checkpoint_event_prologue()
    flats, places = _places(optimizer, names, partitioned)
    swapped = [i for i in range(len(flats)) if partitioned and is_swapped(optimizer, i)]
    on_disk = {i: SwappedGroup(optimizer, i, _MOMENTS) for i in swapped}
    targets = [
        on_disk[i].tensors if i in on_disk else {"fp32": flat.data, **{key: torch.zeros_like(flat) for key in _MOMENTS}}
        for i, flat in enumerate(flats)
    ]

    stored = ("fp32", *_MOMENTS) if checkpoint.updates else ("fp32",)
    for key in set(_MOMENTS) - set(stored):  # no update yet: DeepSpeed has not made them, or they are zeros
        for target in targets:
            target[key].zero_()
    for key in stored:
        missing = set(parameters)
        for name, whole in checkpoint.optimizer_values(key):
            if name not in parameters:
                raise CheckpointError(f"{folder} holds '{name}', which this model does not have")
            missing.discard(name)
            if key == "fp32" and not partitioned:
                parameters[name].data.copy_(whole)
            for place in places.get(name, ()):
                part = whole.flatten().narrow(0, place.source, place.count)
                targets[place.group][key].narrow(0, place.start, place.count).copy_(part)
        if missing:
            raise CheckpointError(f"{folder} lacks '{min(missing)}', which this model has")

    for i, flat in enumerate(flats):
        step = _step(optimizer.optimizer, checkpoint.updates)  # a tensor of its own for each, under torch's Adam
        if i in on_disk:  # DeepSpeed knows the state's tensors by identity
            on_disk[i].flush()
            optimizer.optimizer.state[flat]["step"] = step
        else:
            optimizer.optimizer.state[flat] = {"step": step, **{key: targets[i][key] for key in _MOMENTS}}
    if partitioned:
        if on_disk:
            optimizer.reset_swap_buffers()
        else:
            for group in range(len(flats)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer._link_all_hp_params()
    buffers = dict(engine.module.named_buffers())
    for name, value in checkpoint.buffers.items():
        buffers[name].copy_(value)
    engine.global_steps = checkpoint.step
    engine.global_samples = checkpoint.step * engine.train_batch_size()
    engine.micro_steps = checkpoint.step * engine.gradient_accumulation_steps()
    replay_bias_correction(optimizer.optimizer)
    invalidate_ternary()


def _places(
    optimizer: Any, names: dict[int, str], partitioned: bool
) -> tuple[list[torch.Tensor], dict[str, list[_Place]]]:
    """This rank's flat FP32 groups, and by parameter what of it they hold."""
    flats = list(optimizer.fp32_partitioned_groups_flat if partitioned else optimizer.single_partition_of_fp32_groups)
    found: dict[str, list[_Place]] = {}
    for index in range(len(flats)):
        here = _zero3_places(optimizer, index) if partitioned else _zero2_places(optimizer, index)
        for parameter, place in here:
            if place.count > 0:
                found.setdefault(names[id(parameter)], []).append(place)
    return flats, found


def _zero2_places(optimizer: Any, index: int) -> Iterator[tuple[Any, _Place]]:
    """ZeRO-1 and -2: the group is one vector, cut into equal partitions wherever the borders fall.

    DeepSpeed's own map of it (`_hp_mapping`) takes the parameters in the model's order, which is not that of the
    vector under round_robin_gradients.
    """
    width = optimizer.bit16_groups_flat[index].numel() // torch.distributed.get_world_size()
    low = width * torch.distributed.get_rank()
    group, offsets = optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index]
    for parameter, offset in zip(group, offsets, strict=True):
        first, last = max(offset, low), min(offset + parameter.numel(), low + width)
        yield parameter, _Place(index, first - low, first - offset, last - first)


def _zero3_places(optimizer: Any, index: int) -> Iterator[tuple[Any, _Place]]:
    """ZeRO-3: every parameter is cut into equal parts, one a rank, the last one padded."""
    start = 0
    for parameter in optimizer.fp16_groups[index]:
        width = parameter.partition_numel()
        source = width * torch.distributed.get_rank()
        yield parameter, _Place(index, start, source, max(0, min(width, parameter.ds_numel - source)))
        start += width


def _step(optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """torch's own optimizers count in a tensor, DeepSpeed's in a number."""
    return torch.tensor(float(updates)) if type(optimizer).__module__.startswith("torch.") else updates
