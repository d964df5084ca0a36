"""Bidirectional multi-scale retention (RetNet, 2307.08621; symmetric decay as in RMT, 2309.11523).

Shapes: `B` batch, `T` tokens, `D` hidden, `H` heads, `K` head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.bitlinear import BitLinear
from tbf.model.config import UltraConfig
from tbf.model.norms import rms
from tbf.model.segment_info import SegmentInfo
from tbf.ops.decay_scan import retention_scan
from tbf.ops.rope import apply_rope


class Retention(nn.Module):
    """y_n = sum over m of gamma^|n-m| (q_n k_m) v_m inside the document; out = W_o (RMS_head(y) * SiLU(W_g u)).

    Rotary q and k keep the direction that the symmetric decay forgets. gamma is fixed per head, and the norm per head
    makes RetNet's score normalisers unnecessary: it cancels any positive scale of a row.
    """

    def __init__(self, config: UltraConfig, window: int = 0) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_dim, self.eps = config.retention_heads, config.retention_head_dim, config.norm_eps
        self.qkvg_proj = BitLinear(size, (size,) * 4, ternary=config.use_bitnet)
        self.out_proj = BitLinear(size, size, ternary=config.use_bitnet, sub_norm=True)

    def forward(self, x: Tensor, info: SegmentInfo, norm: Callable[[Tensor], Tensor], loop: int = 0) -> Tensor:
        """x [B, T, D], the residual stream -> its update [B, T, D]."""
        *qkv, gate = self.qkvg_proj(norm(x))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in qkv)  # [B, T, H, K]
        cos, sin = info.rope[self.head_dim]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin) * self.head_dim**-0.5
        y = rms(retention_scan(q, k, v, info.log_gamma, info.ids), self.eps)  # [B, T, H, K]
        return self.out_proj(y.flatten(2) * F.silu(gate))
