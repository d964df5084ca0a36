"""Ternary weights at rest: five values a byte, since 3^5 = 243 fits in 256. 1.6 bits a weight; the optimum is 1.585.

Shapes: `N` output features (summed over `S` slices), `D` input features, `G` = ceil(D / 5) bytes a row.

    byte = sum over i of (value_i + 1) 3^i

Rows are packed one by one, so that any of them can be read alone; the last byte of a row is filled up with zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tbf.errors import CheckpointError
from tbf.ops.ternary_backends import TernaryPlan, TernaryWeight, fastest_tools

VALUES = 5
"""Ternary values in a byte."""


def packed_width(features: int) -> int:
    """Bytes of a row of `features` values."""
    return -(-features // VALUES)


def pack_trits(values: Tensor) -> Tensor:
    """values int8 [.., D] of -1, 0 and 1 -> uint8 [.., G]."""
    digits = (F.pad(values, (0, -values.shape[-1] % VALUES)) + 1).to(torch.uint8).unflatten(-1, (-1, VALUES))
    packed = digits[..., VALUES - 1].clone()
    for place in reversed(range(VALUES - 1)):
        packed.mul_(3).add_(digits[..., place])
    return packed


def unpack_trits(packed: Tensor, features: int) -> Tensor:
    """packed uint8 [.., G] -> int8 [.., D] with D = `features`. Raises CheckpointError for bytes that nobody packed."""
    if packed.numel() and int(packed.max()) >= 3**VALUES:
        raise CheckpointError("packed ternary weights hold an impossible byte, so the file is damaged; copy it again")
    rows = _table(packed.device).index_select(0, packed.flatten().int())  # [bytes, 5]
    values = rows.view(*packed.shape[:-1], packed.shape[-1] * VALUES)
    return values[..., :features].contiguous()


def pack_weight(weight: Tensor, slices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ternarises `weight` FP32 [N, D] or, for stacked experts, [E, N, D], as the forward pass does.

    Returns trits uint8 [.., N, G] and scales FP32 [.., S], one per slice of the rows.
    """
    matrices = weight.detach().unbind() if weight.ndim == 3 else [weight.detach()]
    parts = [[fastest_tools(w.device.type).ternarise(part) for part in w.split(list(slices))] for w in matrices]
    trits = torch.stack([torch.cat([pack_trits(values) for values, _ in row]) for row in parts])
    scales = torch.stack([torch.stack([scale for _, scale in row]) for row in parts])
    return (trits, scales) if weight.ndim == 3 else (trits[0], scales[0])


def prepare_packed(
    trits: Tensor, scales: Tensor, slices: Sequence[int], features: int, plan: TernaryPlan
) -> list[TernaryWeight]:
    """Unpacks what `pack_weight` gave and lays it out for the plan's forward backend: a TernaryWeight per matrix.

    Nothing is quantised anew: the scales are the stored ones. The weights serve inference only (`backward` is empty).
    """
    backend = plan.backend(plan.forward, trits.device.type)
    stacked = trits.ndim == 3
    return [
        TernaryWeight(
            slices=tuple(slices),
            in_features=features,
            forward=[backend.forward_operand(unpack_trits(part, features)) for part in matrix.split(list(slices))],
            backward=scales.new_empty(0),
            scales=scale.float(),
        )
        for matrix, scale in zip(trits if stacked else trits[None], scales if stacked else scales[None])
    ]


@functools.cache
def _table(device: torch.device) -> Tensor:
    """int8 [243, 5]: the values of every byte."""
    codes = torch.arange(3**VALUES)
    digits = [(codes // 3**place % 3 - 1).to(torch.int8) for place in range(VALUES)]
    return torch.stack(digits, -1).to(device)
