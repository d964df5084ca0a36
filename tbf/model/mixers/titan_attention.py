"""Attention with HoPE positions and, as an option, the neural memory of Titans beside it.

Shapes: `B` batch, `T` tokens, `D` hidden, `H` heads, `K` head width.
"""

from __future__ import annotations

from torch import Tensor

from tbf.model.config import UltraConfig
from tbf.model.mixers.softmax_attention import SoftmaxAttention
from tbf.model.mixers.titan_memory import TitanMemory
from tbf.model.segment_info import SegmentInfo
from tbf.ops.hope import hope_attention


class TitanAttention(SoftmaxAttention):
    """W_o (attention + gated memory read), sharing q, k and v. Rotary positions if `use_hope` is off."""

    def __init__(self, config: UltraConfig, window: int = 0) -> None:
        super().__init__(config, window)
        self.use_hope = config.use_hope
        self.memory = TitanMemory(config) if config.titan_memory == "linear" else None

    def mix(self, u: Tensor, info: SegmentInfo) -> Tensor:
        q, k, v = self.heads(u)
        y = self.attend(q, k, v, info)  # [B, T, H, K]
        if self.memory is not None:
            y = y + self.memory(q, k, v, u, info.ids)
        return self.out_proj(y.flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, info: SegmentInfo) -> Tensor:
        if not self.use_hope:
            return super().attend(q, k, v, info)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, K]
        return hope_attention(q, k, v, *info.hope, info.ids, window=self.window).transpose(1, 2)
