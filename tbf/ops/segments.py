"""Documents packed in a row: masks and a convolution that never cross from one into another.

A row's segment ids are contiguous runs; padding is a segment like any other.

Shapes: `B` batch, `T` tokens, `D` channels, `k` taps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tbf.errors import ConfigError


def same_segment(seg: Tensor) -> Tensor:
    """seg [B, T] integer -> [B, 1, T, T] bool, True where query (row) and key (column) share a document."""
    return (seg[:, :, None] == seg[:, None, :]).unsqueeze(1)


def segment_conv(x: Tensor, weight: Tensor, seg: Tensor) -> Tensor:
    """Symmetric depthwise convolution, y_t = sum_j weight[:, j] x_{t + j - k // 2}, other documents counting as zero.

    x [B, T, D], weight [D, k] with odd k, seg [B, T] -> [B, T, D]. Keeps only its inputs for the backward.

    Raises ConfigError when k is even.
    """
    taps = weight.shape[1]
    if taps % 2 == 0:
        raise ConfigError(f"segment_conv has {taps} taps; a symmetric convolution needs an odd number, e.g. {taps + 1}")
    return _SegmentConv.apply(x, weight, seg)


class _SegmentConv(torch.autograd.Function):
    """The shifted products of all taps would fill k times the memory of x if autograd kept them."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, seg: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, seg)
        taps = weight.t().unsqueeze(1)  # [k, 1, D]
        y = x * taps[len(taps) // 2]
        for tap, here, there, same in _shifts(seg, len(taps)):
            y[:, here].addcmul_(x[:, there] * same, taps[tap])
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, seg = ctx.saved_tensors
        taps = weight.t().unsqueeze(1)  # [k, 1, D]
        centre = len(taps) // 2
        grad_x = grad * taps[centre]
        grad_taps = torch.zeros_like(weight.t())  # [k, D]
        grad_taps[centre] = (grad * x).sum((0, 1))
        for tap, here, there, same in _shifts(seg, len(taps)):
            inside = grad[:, here] * same
            grad_x[:, there].addcmul_(inside, taps[tap])
            grad_taps[tap] = (inside * x[:, there]).sum((0, 1))
        return grad_x, grad_taps.t(), None


def _shifts(seg: Tensor, taps: int) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Yields (tap, tokens reached, tokens they read, whether both are in one document [B, n, 1] as numbers)."""
    length = seg.shape[1]
    for shift in range(1, min(taps // 2, length - 1) + 1):
        early, late = slice(0, length - shift), slice(shift, length)
        same = (seg[:, early] == seg[:, late]).unsqueeze(-1)  # [B, T - shift, 1]
        yield taps // 2 + shift, early, late, same
        yield taps // 2 - shift, late, early, same
