"""What every layer needs to know about the documents of a batch, built once per forward.

Everything here is built before the first layer runs: a piece made on demand inside a checkpointed region would make the
recomputation differ from the forward.

Shapes: `B` batch, `T` tokens, `H` heads, `K` head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tbf.model.config import UltraConfig
from tbf.ops.hope import hope_rates
from tbf.ops.rope import rope_angles
from tbf.ops.segments import same_segment

_SLOWEST_DECAY, _FASTEST_DECAY = 1 / 512, 1 / 32


@dataclass(frozen=True)
class SegmentInfo:
    """Document ids and the tables derived from them and from the row length. Positions are row indices."""

    ids: Tensor
    """[B, T] document of each token; 0 is padding."""
    real: Tensor
    """[B, T] bool, False at padding."""
    masks: Mapping[int, Tensor]
    """window -> [B, 1, T, T] bool: which keys (last) each query sees; window 0 is the whole document."""
    log_keys: Mapping[int, Tensor]
    """window -> [B, 1, T, 1]: log of the number of keys each query sees."""
    rope: Mapping[int, tuple[Tensor, Tensor]]
    """head width K -> (cos, sin), each [T, K/2]."""
    hope: tuple[Tensor, Tensor] | None
    """(theta [H, K/2], theta_prime [H])."""
    log_gamma: Tensor | None
    """[H] log decay per token of each retention head."""

    @classmethod
    def build(cls, config: UltraConfig, ids: Tensor) -> SegmentInfo:
        """Builds what the layers of `config` will ask for, on the device of `ids` [B, T]."""
        types = set(config.layer_types)
        names = {name for name, _ in types}
        hope = config.use_hope and "titan_attn" in names
        masked = {window for name, window in types if name in _masked_mixers(config)}
        masks = {window: attention_mask(ids, window) for window in masked}
        widths = {config.head_dim} if masked else set()
        widths |= {config.retention_head_dim} if "retnet" in names else set()
        with torch.device(ids.device):
            return cls(
                ids=ids,
                real=ids > 0,
                masks=masks,
                log_keys={w: masks[w].sum(-1, keepdim=True).log() for name, w in types if name == "sigmoid_attn"},
                rope={k: rope_angles(ids.shape[1], k, config.rope_base, ids.device, torch.float32) for k in widths},
                hope=hope_rates(config.num_heads, config.head_dim, config.hope_base, config.hope_damping)
                if hope
                else None,
                log_gamma=retention_log_gamma(config.retention_heads) if "retnet" in names else None,
            )


def _masked_mixers(config: UltraConfig) -> set[str]:
    """Mixers that attend through a [B, 1, T, T] mask and rotary positions; HoPE masks documents by itself."""
    mixers = {"standard_attn", "sigmoid_attn", "ode"}
    return mixers if config.use_hope else mixers | {"titan_attn"}


def attention_mask(ids: Tensor, window: int) -> Tensor:
    """[B, T] -> [B, 1, T, T] bool: same document and, if window > 0, at most window // 2 tokens away."""
    mask = same_segment(ids)  # [B, 1, T, T]
    if window:
        position = torch.arange(ids.shape[1], device=ids.device)  # [T]
        mask = mask & ((position[:, None] - position).abs() <= window // 2)
    return mask


def retention_log_gamma(heads: int) -> Tensor:
    """[H] log(1 - d), with decays d per token spaced geometrically from 1/32 (local heads) to 1/512."""
    decay = torch.linspace(math.log(_FASTEST_DECAY), math.log(_SLOWEST_DECAY), heads).exp()
    return torch.log1p(-decay)
