"""The neural memory of Titans (2501.00663) with a matrix per head.

Shapes: `B` batch, `T` tokens, `D` hidden, `H` heads, `K` head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.config import UltraConfig
from tbf.model.norms import rms
from tbf.ops.titan_scan import titan_scan

_MAX_MOMENTUM = 0.95
_READ_EPS = 1e-4
"""Floor of the read's norm: at the start of a document the memory holds next to nothing."""


class TitanMemory(nn.Module):
    """Fast weights per head, trained at test time: surprise with momentum, and forgetting, in both directions.

    Each head's matrix M takes gradient steps on |k M - v|^2 along the document and is read as q M. The step size is
    theta = sigmoid(.) (1 - eta) / chunk with momentum eta < 0.95: a chunk of equal keys, the worst case, then stays
    stable. Documents start from a learned M. The read is normed per head and enters through a gate that starts shut.
    """

    no_weight_decay = frozenset({"initial"})

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        self.num_heads, self.chunk_size = config.num_heads, config.titan_chunk_size
        width = config.head_dim
        self.gates = nn.Linear(config.hidden_size, 7 * config.num_heads)  # 3 per direction, and the read gate
        self.gates.no_weight_decay = frozenset({"weight"})
        self.initial = nn.Parameter(torch.empty(config.num_heads, width, width))  # [H, K, K]

    def init_parameters(self) -> None:
        nn.init.normal_(self.initial, std=0.02)
        step, momentum, forget, read = 0.0, 1.0, -4.0, -2.0
        with torch.no_grad():
            bias = self.gates.bias.view(7, self.num_heads)
            for row, value in enumerate((step, momentum, forget, step, momentum, forget, read)):
                bias[row] = value

    def forward(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, segments: Tensor) -> Tensor:
        """q, k, v [B, T, H, K], u [B, T, D], segments [B, T] -> gated read [B, T, H, K]."""
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, K]
        gates = torch.sigmoid(self.gates(u)).unflatten(-1, (7, self.num_heads)).permute(2, 0, 3, 1)  # [7, B, H, T]
        read = torch.zeros_like(v)
        for direction in range(2):
            step, momentum, forget = gates[3 * direction : 3 * direction + 3]
            momentum = _MAX_MOMENTUM * momentum
            step = step * (1 - momentum) / self.chunk_size
            read = read + titan_scan(
                q, k, v, step, momentum, forget, segments, self.initial,
                chunk_size=self.chunk_size, reverse=direction == 1,
            )  # fmt: skip
        return (gates[6][..., None] * rms(read, _READ_EPS)).transpose(1, 2)
