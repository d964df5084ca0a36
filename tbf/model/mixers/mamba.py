"""Bidirectional Mamba-2 (SSD, 2405.21060; two directions with their own B, C and step sizes as in Hydra, 2407.09941).

Shapes: `B` batch, `T` tokens, `D` hidden, `I` inner width, `H` heads, `P` head width, `N` state size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.bitlinear import BitLinear
from tbf.model.config import UltraConfig
from tbf.model.conv import SegmentConv
from tbf.model.segment_info import SegmentInfo
from tbf.ops.decay_scan import decay_scan

_STEP_RANGE = (1e-3, 0.1)
_DECAY_RANGE = (1.0, 16.0)


class Mamba(nn.Module):
    """Gated state space block: in_proj, masked symmetric convolution, one selective scan per direction, out_proj.

    The forward scan includes the token itself and the backward one doesn't, so no pair counts twice. Both share the
    values, A, the step bias and D. SubLN of the output projection is the norm that follows the gate.
    """

    no_weight_decay = frozenset({"A_log", "dt_bias", "skip"})

    def __init__(self, config: UltraConfig, window: int = 0) -> None:
        super().__init__()
        self.inner, self.state = config.mamba_inner_size, config.mamba_state_size
        self.num_heads, self.head_dim = config.mamba_heads, config.mamba_head_dim
        self.in_proj = BitLinear(
            config.hidden_size,
            (self.inner, self.inner, 4 * self.state, 2 * self.num_heads),  # gate, values, B and C, step sizes
            ternary=config.use_bitnet,
        )
        self.conv = SegmentConv(self.inner + 4 * self.state, config.mamba_conv_kernel, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))  # [H]
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))  # [H]
        self.skip = nn.Parameter(torch.empty(self.num_heads))  # [H], the D of the papers
        self.out_proj = BitLinear(self.inner, config.hidden_size, ternary=config.use_bitnet, sub_norm=True)

    def init_parameters(self) -> None:
        """Official ranges: A uniform in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1], D one."""
        low, high = (math.log(step) for step in _STEP_RANGE)
        with torch.no_grad():
            step = self.dt_bias.uniform_(low, high).exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
            self.A_log.uniform_(*_DECAY_RANGE).log_()
            self.skip.fill_(1.0)

    def forward(self, x: Tensor, info: SegmentInfo, norm: Callable[[Tensor], Tensor], loop: int = 0) -> Tensor:
        """x [B, T, D], the residual stream -> its update [B, T, D]."""
        gate, values, states, steps = self.in_proj(norm(x))
        convolved = F.silu(self.conv(torch.cat([values, states], -1), info.ids))
        values, *states = convolved.split((self.inner, *(self.state,) * 4), -1)
        values = values.unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, H, P]
        b_fwd, c_fwd, b_bwd, c_bwd = (s.unsqueeze(2) for s in states)  # [B, T, 1, N], shared by all heads
        dt_fwd, dt_bwd = F.softplus(steps.unflatten(-1, (2, self.num_heads)) + self.dt_bias).unbind(-2)  # [B, T, H]
        rate = -self.A_log.exp()  # [H]
        y = values * self.skip[:, None]
        y = y + decay_scan(c_fwd, b_fwd, values * dt_fwd[..., None], dt_fwd * rate, info.ids)
        y = y + decay_scan(
            c_bwd, b_bwd, values * dt_bwd[..., None], dt_bwd * rate, info.ids, reverse=True, inclusive=False
        )
        return self.out_proj(y.flatten(2) * F.silu(gate))
