"""Normalisation layers whose parameters have one row per loop.

A looped model visits each layer `L` times with the same projections; separate norm parameters are a cheap way to let
the visits differ. A loop index beyond the trained ones uses the last row.

Shapes: `D` features, `L` loops, `...` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.config import UltraConfig

POINTWISE_ALPHA = 0.5
"""Initial input scale of Derf and DyT in their papers' encoders."""


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scales the last dimension to unit root mean square, without parameters."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain (1910.07467)."""

    no_weight_decay = frozenset({"weight"})

    def __init__(self, size: int, *, loops: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.loops, self.eps = loops, eps
        self.weight = nn.Parameter(torch.ones(loops, size))  # [L, D]

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        row = min(loop, self.loops - 1)
        return F.rms_norm(x, x.shape[-1:], self.weight[row], self.eps)


class LayerNorm(nn.Module):
    """Layer norm with gain and bias (1607.06450)."""

    no_weight_decay = frozenset({"weight", "bias"})

    def __init__(self, size: int, *, loops: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.loops, self.eps = loops, eps
        self.weight = nn.Parameter(torch.ones(loops, size))  # [L, D]
        self.bias = nn.Parameter(torch.zeros(loops, size))  # [L, D]

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        row = min(loop, self.loops - 1)
        return F.layer_norm(x, x.shape[-1:], self.weight[row], self.bias[row], self.eps)


class Derf(nn.Module):
    """weight * erf(alpha x + shift) + bias, scalar alpha and shift (2512.10938). `eps` is unused: no statistics."""

    no_weight_decay = frozenset({"weight", "bias", "alpha", "shift"})

    def __init__(self, size: int, *, loops: int = 1, eps: float = 0.0) -> None:
        super().__init__()
        self.loops = loops
        self.weight = nn.Parameter(torch.ones(loops, size))  # [L, D]
        self.bias = nn.Parameter(torch.zeros(loops, size))  # [L, D]
        self.alpha = nn.Parameter(torch.full((loops,), POINTWISE_ALPHA))  # [L]
        self.shift = nn.Parameter(torch.zeros(loops))  # [L]

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        row = min(loop, self.loops - 1)
        return torch.addcmul(self.bias[row], self.weight[row], torch.erf(self.alpha[row] * x + self.shift[row]))


class DynamicTanh(nn.Module):
    """weight * tanh(alpha x) + bias, with a scalar alpha (2503.10622). `eps` is unused: no statistics."""

    no_weight_decay = frozenset({"weight", "bias", "alpha"})

    def __init__(self, size: int, *, loops: int = 1, eps: float = 0.0) -> None:
        super().__init__()
        self.loops = loops
        self.weight = nn.Parameter(torch.ones(loops, size))  # [L, D]
        self.bias = nn.Parameter(torch.zeros(loops, size))  # [L, D]
        self.alpha = nn.Parameter(torch.full((loops,), POINTWISE_ALPHA))  # [L]

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        row = min(loop, self.loops - 1)
        return torch.addcmul(self.bias[row], self.weight[row], torch.tanh(self.alpha[row] * x))


NORMS: dict[str, type[nn.Module]] = {
    "rms": RMSNorm,
    "layer_norm": LayerNorm,
    "derf": Derf,
    "dynamic_tanh": DynamicTanh,
}


def build_norm(config: UltraConfig) -> nn.Module:
    """The pre-norm that `config.norm_type` names: called as norm(x [..., D], loop) -> [..., D]."""
    return NORMS[config.norm_type](config.hidden_size, loops=config.num_loops, eps=config.norm_eps)
