"""The quantisers of ternary compute in eager torch: what every fused kernel must equal bit for bit, and what runs
where none was built.

Shapes: `M` rows (tokens), `N` output features, `D` input features.

weight      s = clamp(mean|W|, 1e-5)            Wq = clip(round(W / s), -1, 1)        one scale per matrix
activation  s = clamp(max|x|, 1e-5) / 127       Xq = round(x / s)                     one scale per row
gradient    the same with 1e-20 (a loss averaged over thousands of tokens has gradients below 1e-5), along rows or
            columns, and optionally in two parts: g = s * (high + low / 254)

Rounding is half to even; the mean is taken in FP64, so it doesn't depend on the order of the sum. A row, column or
weight that holds NaN or Inf gets the scale NaN, so that all its products are NaN: the trainer's guard must see them.
Formulas: BitNet b1.58 (arXiv 2402.17764) as its published converters round them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT_EPS = 1e-5  # smallest mean|W|
ACTIVATION_EPS = 1e-5  # smallest max|x| of a token
GRADIENT_EPS = 1e-20  # smallest max|g| of a row or column
LEVELS = 127.0
LOW_STEP = 254.0  # the low part counts in 1/254 of the high part's step


@dataclass
class Quantised:
    """A matrix in int8 with one scale per row or column: value = scale * (high + low / 254).

    `total` and `low_total` are int32 sums along the scaled direction, where a GEMM needs them.
    """

    high: Tensor
    scale: Tensor
    low: Tensor | None = None
    total: Tensor | None = None
    low_total: Tensor | None = None


class ReferenceTools:
    """The quantisers that a backend uses, on any device."""

    name = "eager"

    def quantise_rows(
        self, x: Tensor, gain: Tensor | None = None, norm_eps: float = 0.0
    ) -> tuple[Quantised, Tensor | None]:
        """Quantises x [M, D] by row; with `gain` [D], RMSNorm(x) * gain instead. Returns it and 1/rms [M]."""
        rrms = None
        if gain is not None:
            square = x.double().square().mean(-1)  # FP64: the sum's order must not decide a rounding
            rrms = (square + norm_eps).sqrt().reciprocal().to(x.dtype)  # [M]
            x = x * rrms[:, None] * gain
        scale, inverse = _scale(x.abs().amax(-1) if x.shape[-1] else x.new_zeros(len(x)), ACTIVATION_EPS)
        return Quantised(_to_int8(x * inverse[:, None]), scale), rrms

    def norm_backward(self, dy: Tensor, x: Tensor, gain: Tensor, rrms: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of RMSNorm(x) * gain: (dx [M, D], dgain [D])."""
        normed = x * rrms[:, None]
        scaled = dy * gain
        dx = rrms[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return dx, (dy * normed).sum(0)

    def ternarise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns int8 values [N, D] and the scale []."""
        mean = weight.abs().mean(dtype=torch.float64)
        finite = mean.isfinite()
        mean = mean.clamp(min=WEIGHT_EPS)
        inverse = torch.where(finite, mean.reciprocal(), 0.0).to(weight.dtype)
        values = (weight * inverse).nan_to_num(0.0).round().clamp(-1, 1).to(torch.int8)
        return values, torch.where(finite, mean, torch.nan).to(weight.dtype)

    def quantise_gradient(
        self,
        dys: Sequence[Tensor],
        scales: Tensor,
        row_factor: Tensor | None,
        *,
        low: bool,
        rows: bool,
        columns: bool,
    ) -> tuple[Quantised | None, Quantised | None]:
        """Turns a gradient, given as slices [M, N_i] side by side, into int8 along rows, columns or both.

        rows     of  dY * scale of the slice:      for dX = dY (scale Wq)
        columns  of  dY * row_factor of the row:   for dW = (dY factor)^T Xq
        """
        by_row = by_column = None
        if rows:
            scaled = torch.cat([dy * scale for dy, scale in zip(dys, scales.unbind())], -1)  # [M, N]
            by_row = _split(scaled, 1, low)
        if columns:
            whole = torch.cat(list(dys), -1) if len(dys) > 1 else dys[0]  # [M, N]
            by_column = _split(whole if row_factor is None else whole * row_factor[:, None], 0, low)
        return by_row, by_column

    def scale_products(self, high: Tensor, low: Tensor | None, row_scale: Tensor, scale: Tensor) -> Tensor:
        """Scales integer products [M, N] (int32, or whole numbers in FP32): (high + low / 254) * row_scale * scale."""
        y = high.to(row_scale.dtype)
        if low is not None:
            y = y + low.to(row_scale.dtype) * torch.tensor(1.0 / LOW_STEP, dtype=row_scale.dtype)
        return y * row_scale[:, None] * scale


def _scale(largest: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    finite = largest.isfinite()
    clamped = largest.clamp(min=eps)
    inverse = (
        torch.full_like(clamped, LEVELS) / clamped
    )  # `LEVELS / clamped` would be a rounded reciprocal, times LEVELS
    return torch.where(finite, clamped / LEVELS, torch.nan), torch.where(finite, inverse, 0.0)


def _split(x: Tensor, dim: int, low: bool) -> Quantised:
    largest = x.abs().amax(dim) if x.shape[dim] else x.new_zeros(x.shape[1 - dim])
    scale, inverse = _scale(largest, GRADIENT_EPS)
    steps = (x * inverse.unsqueeze(dim)).nan_to_num(0.0)
    high = steps.round()
    rest = _to_int8((steps - high) * LOW_STEP) if low else None
    return Quantised(_to_int8(high), scale, rest)


def _to_int8(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0).round().to(torch.int8)
