"""Rotary positions (RoPE, arXiv 2104.09864) over interleaved pairs of channels.

Shapes: `B` batch, `T` tokens, `H` heads, `K` head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(T: int, K: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [T, K / 2], of t * base^(-2 i / K) for position t and pair i.

    Computed in FP64: in FP32 the angle itself would be off by 5e-4 at position 8192.
    """
    rates = base ** (-torch.arange(0, K, 2, device=device, dtype=torch.float64) / K)  # [K/2]
    angles = torch.arange(T, device=device, dtype=torch.float64)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (0, 1), (2, 3), ... of x [B, T, H, K] by the angles of cos, sin [T, K / 2].

    As complex numbers: one pass over memory, where slices of every second channel would need many.
    """
    pairs = x.unflatten(-1, (-1, 2))  # [B, T, H, K/2, 2]
    *outer, last = pairs.stride()
    if last != 1 or any(stride % 2 for stride in outer) or pairs.storage_offset() % 2:
        pairs = pairs.contiguous()
    turns = torch.complex(cos, sin)[:, None]  # [T, 1, K/2]
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)
