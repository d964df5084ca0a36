"""The dense feed-forward block; `tbf.model.moe` has the one with experts.

Shapes: `B` batch, `T` tokens, `D` hidden, `F` inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from tbf.model.bitlinear import BitLinear
from tbf.model.config import UltraConfig
from tbf.model.segment_info import SegmentInfo

GATED = {"swiglu": F.silu, "geglu": F.gelu}


class _SquaredRelu(torch.autograd.Function):
    """relu(x)^2 (2109.08668) with one product back, where autograd makes four passes of it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


PLAIN = {"relu2": _SquaredRelu.apply, "silu": F.silu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) when gated (2002.05202), with SubLN before the down projection."""

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        size = config.ffn_size
        self.gated = config.ffn_activation in GATED
        self.activation = (GATED if self.gated else PLAIN)[config.ffn_activation]
        self.up_proj = BitLinear(config.hidden_size, (size, size) if self.gated else size, ternary=config.use_bitnet)
        self.down_proj = BitLinear(size, config.hidden_size, ternary=config.use_bitnet, sub_norm=True)

    def forward(
        self, u: Tensor, info: SegmentInfo, loop: int = 0, chosen: list[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """u [B, T, D], normed -> ([B, T, D], None: there is no router)."""
        if self.gated:
            gate, up = self.up_proj(u)  # [B, T, F] each
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.up_proj(u))  # [B, T, F]
        return self.down_proj(inner), None
