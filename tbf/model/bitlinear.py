"""Linear layers with ternary weights and int8 activations (BitNet b1.58, arXiv 2402.17764).

Shapes: `D` input features, `N` output features, summed over the slices of a fused projection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.errors import ConfigError
from tbf.ops.ternary import ternary_linear
from tbf.ops.ternary_backends import TernaryPlan
from tbf.ops.ternary_cache import TernaryCache, invalidate_ternary

__all__ = ["BitLinear", "invalidate_ternary", "set_ternary_plan", "ternary_shapes"]


class BitLinear(nn.Module):
    """y = ternary(W) int8(x), without bias.

    A sequence of `out_features` fuses several projections of one input: one `weight`, one quantised input, one ternary
    scale per slice, and `forward` returns a tuple. `sub_norm` puts an RMSNorm with gain before quantising (SubLN).
    `ternary=False` keeps the parameters and computes a plain linear layer.

    The ternary form of the weight is made once per optimizer step; call `invalidate_ternary()` after writing weights in
    any other way. `ternary_plan` says which kernels compute; None takes the probed plan of the device.

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
        self.ternary_plan: TernaryPlan | None = None
        self.ternary_cache = TernaryCache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.sub_norm is not None:
            nn.init.ones_(self.sub_norm)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps x [..., D] to [..., N], or to a tuple of [..., N_i] for a fused projection."""
        if self.ternary:
            ys = ternary_linear(
                x,
                self.weight,
                self.ternary_cache,
                slices=self.slices,
                gain=self.sub_norm,
                norm_eps=self.eps,
                plan=self.ternary_plan,
            )
        else:
            if self.sub_norm is not None:
                x = F.rms_norm(x, (self.in_features,), self.sub_norm, self.eps)
            ys = F.linear(x, self.weight).split(self.slices, dim=-1)
        return ys if self.fused else ys[0]

    def extra_repr(self) -> str:
        slices = self.slices if self.fused else self.out_features
        return f"{self.in_features} -> {slices}, ternary={self.ternary}, sub_norm={self.sub_norm is not None}"


def set_ternary_plan(model: nn.Module, plan: TernaryPlan) -> None:
    """Gives every ternary module of `model` (whatever has a `ternary_plan`) its kernels and gradient mode."""
    for module in model.modules():
        if hasattr(module, "ternary_plan"):
            module.ternary_plan = plan


def ternary_shapes(model: nn.Module, limit: int = 3) -> list[tuple[int, int]]:
    """The (in, out) sizes that most of the model's ternary weights have: what a probe should time."""
    sizes: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        if isinstance(module, BitLinear) and module.ternary:
            sizes.update({(module.in_features, n): n * module.in_features for n in module.slices})
    return [shape for shape, _ in sizes.most_common(limit)]
