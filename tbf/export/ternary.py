"""The packed ternary export: five weights a byte and their scales, everything else in FP32, in one safetensors file.

A layer's `weight` [.., N, D] is stored as `trits` uint8 [.., N, ceil(D / 5)] and `scales` FP32 [.., slices]
(tbf/ops/ternary_pack.py). They are the state of the layers in tbf/model/packed.py: loading is loading a state dict,
and nothing is ever quantised a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tbf.errors import ConfigError
from tbf.export.stored import StoredTensor
from tbf.model.packed import ternary_layers
from tbf.ops.ternary_pack import pack_weight, packed_width

WEIGHT = ".weight"


def packed_slices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name of each weight of `model` (meta will do) that is packed -> rows of its slices."""
    return {name + WEIGHT: layer.slices for name, layer in ternary_layers(model).items()}


def packed_tensors(
    tensors: Mapping[str, StoredTensor], slices: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """`tensors` with the weights named in `slices` replaced by their trits and scales, packed when they are read.

    Raises ConfigError when there are none.
    """
    if not slices:
        raise ConfigError("the model has no ternary weights (use_bitnet is false); export it as safetensors")
    packed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        packed |= _packed(name, tensor, slices[name]) if name in slices else {name: tensor}
    return packed


def stored_forms(name: str, value: Tensor, slices: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """What a ternary export holds of the weight `name`: (name, value) itself, or its trits and its scales."""
    if name in slices:
        yield from zip(_names(name), pack_weight(value, slices[name]))
    else:
        yield name, value


def size_report(tensors: Mapping[str, StoredTensor], slices: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Bytes that the ternary weights among `tensors` (not packed yet) take once they are, scales included."""
    weights = sum(tensors[name].shape.numel() for name in slices)
    packed = [_packed(name, tensors[name], rows) for name, rows in slices.items()]
    size = sum(part.nbytes for parts in packed for part in parts.values())
    return {"weights": weights, "bytes": size, "bytes_per_weight": round(size / weights, 6)}


def _packed(name: str, tensor: StoredTensor, slices: Sequence[int]) -> dict[str, StoredTensor]:
    # Read and ternarised once for the trits and once for the scales, which stand far apart in the file: keeping one of
    # them until the other is written would cost more memory than a second pass costs time.
    def part(index: int) -> Tensor:
        return pack_weight(tensor.read(), slices)[index]

    trits, scales = _names(name)
    *outer, features = tensor.shape
    return {
        trits: StoredTensor(torch.Size([*outer, packed_width(features)]), torch.uint8, lambda: part(0)),
        scales: StoredTensor(torch.Size([*outer[:-1], len(slices)]), torch.float32, lambda: part(1)),
    }


def _names(weight: str) -> tuple[str, str]:
    layer = weight.removesuffix(WEIGHT)
    return f"{layer}.trits", f"{layer}.scales"
