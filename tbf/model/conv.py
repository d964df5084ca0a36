"""A symmetric depthwise convolution that stays inside documents.

Shapes: `B` batch, `T` tokens, `C` channels, `k` taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tbf.ops.segments import segment_conv


class SegmentConv(nn.Module):
    """y_t = bias + sum over taps j of w_j x_{t+j}, where tokens of other documents count as zero."""

    def __init__(self, channels: int, kernel: int, *, bias: bool = False, identity: bool = False) -> None:
        super().__init__()
        self.identity = identity
        self.weight = nn.Parameter(torch.empty(channels, kernel))  # [C, k]
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None  # [C]

    def init_parameters(self) -> None:
        """The identity, or uniform in +-1/sqrt(k), PyTorch's choice for a depthwise convolution."""
        taps = self.weight.shape[1]
        if self.identity:
            with torch.no_grad():
                self.weight.zero_()[:, taps // 2] = 1
        else:
            nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        """x [B, T, C], segments [B, T] -> [B, T, C]."""
        y = segment_conv(x, self.weight, segments)
        return y if self.bias is None else y + self.bias
