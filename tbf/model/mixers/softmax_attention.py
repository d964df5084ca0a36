"""Multi-head attention inside documents: softmax (`standard_attn`) and sigmoid (`sigmoid_attn`), both with QK-norm.

Shapes: `B` batch, `T` tokens, `D` hidden, `H` heads, `K` head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.bitlinear import BitLinear
from tbf.model.config import UltraConfig
from tbf.model.norms import RMSNorm
from tbf.model.segment_info import SegmentInfo
from tbf.ops.rope import apply_rope


class SoftmaxAttention(nn.Module):
    """Rotary softmax attention; the base of the other attention mixers, which replace `attend` or `mix`."""

    def __init__(self, config: UltraConfig, window: int = 0, *, sub_norm: bool = True) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_dim, self.window = config.num_heads, config.head_dim, window
        self.qkv_proj = BitLinear(size, (size, size, size), ternary=config.use_bitnet)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.out_proj = BitLinear(size, size, ternary=config.use_bitnet, sub_norm=sub_norm)

    def forward(self, x: Tensor, info: SegmentInfo, norm: Callable[[Tensor], Tensor], loop: int = 0) -> Tensor:
        """x [B, T, D], the residual stream -> its update [B, T, D]."""
        return self.mix(norm(x), info)

    def mix(self, u: Tensor, info: SegmentInfo) -> Tensor:
        """u [B, T, D], normed -> [B, T, D]."""
        q, k, v = self.heads(u)
        return self.out_proj(self.attend(q, k, v, info).flatten(2))

    def heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [B, T, D] -> q, k, v [B, T, H, K], with q and k of unit RMS times a gain."""
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in self.qkv_proj(u))
        return self.q_norm(q), self.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, info: SegmentInfo) -> Tensor:
        """q, k, v [B, T, H, K] -> [B, T, H, K]."""
        q, k, v = self.rotated(q, k, v, info)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=info.masks[self.window])
        return y.transpose(1, 2)

    def rotated(self, q: Tensor, k: Tensor, v: Tensor, info: SegmentInfo) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, K] -> [B, H, T, K], with rotary positions in q and k."""
        cos, sin = info.rope[self.head_dim]
        return apply_rope(q, cos, sin).transpose(1, 2), apply_rope(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


class SigmoidAttention(SoftmaxAttention):
    """sigmoid(q k / sqrt(K) - log n) v, n the number of keys that the query sees (2409.04431).

    The bias makes the weights of a row sum to about one at first, as a softmax's do. Keeps [B, H, T, T] for backward.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, info: SegmentInfo) -> Tensor:
        q, k, v = self.rotated(q, k, v, info)
        scores = (q * self.head_dim**-0.5) @ k.mT - info.log_keys[self.window]  # [B, H, T, T]
        weights = torch.sigmoid(scores).masked_fill(~info.masks[self.window], 0.0)
        return (weights @ v).transpose(1, 2)
