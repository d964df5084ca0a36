"""Ternary weights and int8 activations (BitNet b1.58, arXiv 2402.17764).

Shapes: `N` output features, `D` input features, `M` tokens, `E` experts.

weight      s = clamp(mean|W|, 1e-5)         Wq = clip(round(W / s), -1, 1)          value Wq * s
activation  s = clamp(max|x|, 1e-5) / 127    Xq = clip(round(x / s), -128, 127)      value Xq * s, one s per token

Rounding is half to even. The mean is taken in FP64, so the scale doesn't depend on the order of the sum. Gradients pass
straight through both roundings, and the products of the backward use the quantised operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

WEIGHT_EPS = 1e-5  # smallest mean|W|
ACTIVATION_EPS = 1e-5  # smallest max|x| of a token


def ternary_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternarises `weight` [..., N, D], one scale per leading index.

    Returns (values in {-1, 0, 1} [..., N, D], scale [..., 1, 1]) with weight ~ values * scale.
    """
    mean = weight.detach().abs().mean(dim=(-2, -1), keepdim=True, dtype=torch.float64)  # [..., 1, 1]
    inverse = (1.0 / mean.clamp(min=WEIGHT_EPS)).to(weight.dtype)
    return (weight.detach() * inverse).round_().clamp_(-1, 1), inverse.reciprocal()


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises `x` [..., D] to whole numbers in -128..127 of its own dtype, one scale per row.

    Returns (values [..., D], scale [..., 1]) with x ~ values * scale.
    """
    inverse = 127.0 / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=ACTIVATION_EPS)  # [..., 1]
    return (x.detach() * inverse).round_().clamp_(-128, 127), inverse.reciprocal()


class _StraightThrough(torch.autograd.Function):
    """Gives `value` forward and the gradient to `x` backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def ternary_fake_quant(weight: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Returns the ternary value of `weight`, in its dtype, with a straight-through gradient.

    `weight` is [N, D] or, for stacked experts, [E, N, D] (one scale per expert). `rows` cuts N into slices that each
    get a scale of their own, for fused projections.
    """
    slices = weight.split(list(rows), dim=-2) if rows is not None else (weight,)
    values = [quantised * scale for quantised, scale in map(ternary_reference, slices)]
    return _StraightThrough.apply(weight, torch.cat(values, dim=-2) if len(values) > 1 else values[0])


def activation_fake_quant(x: Tensor) -> Tensor:
    """Returns the int8 value of `x` [..., D], in its dtype, with a straight-through gradient."""
    values, scale = quantise_rows_reference(x)
    return _StraightThrough.apply(x, values * scale)
