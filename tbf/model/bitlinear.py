"""Linear layers with ternary weights and int8 activations (BitNet b1.58, arXiv 2402.17764).

Shapes: `D` input features, `N` output features, summed over the slices of a fused projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.errors import ConfigError
from tbf.ops.ternary import activation_fake_quant, ternary_fake_quant


def invalidate_ternary() -> None:
    """Tells every BitLinear that weights were changed by something other than an optimizer step."""


class BitLinear(nn.Module):
    """y = ternary(W) int8(x), without bias.

    A sequence of `out_features` fuses several projections of one input: one `weight`, one quantised input, one ternary
    scale per slice, and `forward` returns a tuple. `sub_norm` puts an RMSNorm with gain before quantising (SubLN).
    `ternary=False` keeps the parameters and computes a plain linear layer.

    Raises ConfigError when a size isn't positive.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        ternary: bool = True,
        sub_norm: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.fused = not isinstance(out_features, int)
        self.slices = tuple(out_features) if self.fused else (out_features,)
        if in_features <= 0 or not self.slices or min(self.slices) <= 0:
            raise ConfigError(f"BitLinear: sizes must be positive, got {in_features} -> {out_features}")
        self.out_features = sum(self.slices)
        self.ternary = ternary
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features))  # [N, D]
        self.sub_norm = nn.Parameter(torch.ones(in_features)) if sub_norm else None  # [D]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.sub_norm is not None:
            nn.init.ones_(self.sub_norm)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps x [..., D] to [..., N], or to a tuple of [..., N_i] for a fused projection."""
        if self.sub_norm is not None:
            x = F.rms_norm(x, (self.in_features,), self.sub_norm, self.eps)
        if self.ternary:
            y = F.linear(activation_fake_quant(x), ternary_fake_quant(self.weight, self.slices))
        else:
            y = F.linear(x, self.weight)
        return y.split(self.slices, dim=-1) if self.fused else y

    def extra_repr(self) -> str:
        slices = self.slices if self.fused else self.out_features
        return f"{self.in_features} -> {slices}, ternary={self.ternary}, sub_norm={self.sub_norm is not None}"
