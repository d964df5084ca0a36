"""Attention with hyperbolic rotary positions (HoPE, arXiv 2509.05218), in a form that can't overflow.

HoPE boosts pairs of channels by cosh and sinh of position times theta, damped by theta' > theta. In light-cone
coordinates u = (a + b) / sqrt 2, w = (a - b) / sqrt 2 the boost is diagonal, and the logit of a pair becomes

    S_mn = sum over channels c of q_c k_c exp(-rate_c |m - n|)     rate = theta' -+ theta over (u, w) where m >= n,
                                                                   theta' +- theta where m < n

which is relative, at most |q| |k|, and knows the direction. Queries go in blocks. A block and all keys before it (or
after it) need one product, with positions counted from the edge of the block: no exponent is positive then, for any T.
Only the block itself needs two products, one per direction, with positions counted from its centre.

Shapes: `B` batch, `H` heads, `T` tokens, `K` head width, `N` queries of a block, `M` keys that a block looks at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tbf.errors import ConfigError

FASTEST, SLOWEST = 1 / 16, 1 / 1024
"""theta' of the first and the last head, per token."""
MAX_BLOCK = 512
"""Exponents inside a block reach (theta' + theta) * block / 2 <= 32; FP32 ends at 88."""
BLOCK = 128
"""Small blocks save work, as only the block itself needs two products; smaller ones than this lose it in calls."""
RECOMPUTE_FROM = 2048
"""Row length from which the backward recomputes the scores of each block instead of keeping B H T^2 of them."""


def hope_rates(H: int, K: int, base: float, damping: float) -> tuple[Tensor, Tensor]:
    """FP32 rates per token: theta [H, K / 2], theta' [H].

    Heads span time scales from 16 to 1024 tokens: theta'_h is geometric between 1/16 and 1/1024. Inside a head theta_i
    falls from theta'_h - min(damping, theta'_h / 2) by a factor `base`. The paper's own constants (theta up to 1) leave
    nothing of a logit after 64 tokens.
    """
    theta_prime = torch.linspace(math.log(FASTEST), math.log(SLOWEST), H, dtype=torch.float64).exp()  # [H]
    largest = theta_prime - (theta_prime / 2).clamp(max=damping)
    falling = base ** -torch.linspace(0, 1, K // 2, dtype=torch.float64)  # [K/2]
    return (largest[:, None] * falling).float(), theta_prime.float()


def hope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    theta_prime: Tensor,
    seg: Tensor,
    *,
    window: int = 0,
    block_size: int = BLOCK,
) -> Tensor:
    """softmax(S / sqrt K) v inside documents: q, k, v [B, H, T, K], seg [B, T] -> [B, H, T, K].

    theta [H, K / 2] and theta_prime [H] as of `hope_rates`. window > 0: a token sees those at most window // 2 away,
    at a cost linear in T.

    Raises ConfigError for a block size outside 1..512.
    """
    if not 1 <= block_size <= MAX_BLOCK:
        raise ConfigError(f"hope_attention: block_size is {block_size}; it must lie in 1..{MAX_BLOCK}")
    tokens, reach = q.shape[2], window // 2 if window else q.shape[2]
    q, k = _light_cone(q) * q.shape[3] ** -0.5, _light_cone(k)
    rates = _channel_rates(theta, theta_prime, q.dtype)
    recompute = tokens >= RECOMPUTE_FROM and torch.is_grad_enabled()
    outputs = []
    for start in range(0, tokens, block_size):
        stop = min(start + block_size, tokens)
        first, last = max(0, start - reach), min(tokens, stop + reach)
        args = (
            q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], *rates,
            seg[:, start:stop], seg[:, first:last], start - first, reach,
        )  # fmt: skip
        if recompute:
            outputs.append(checkpoint(_attend_block, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend_block(*args))
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


def hope_scores(q: Tensor, k: Tensor, theta: Tensor, theta_prime: Tensor, *, block_size: int = BLOCK) -> Tensor:
    """Unscaled, unmasked logits: q, k [B, H, T, K] -> [B, H, T, T]. For inspection: memory is quadratic in T."""
    q, k = _light_cone(q), _light_cone(k)
    rates = _channel_rates(theta, theta_prime, q.dtype)
    starts = range(0, q.shape[2], block_size)
    return torch.cat([_block_scores(q[:, :, s : s + block_size], k, *rates, s) for s in starts], 2)


def _light_cone(x: Tensor) -> Tensor:
    """Pairs (a, b) of the last dimension -> all u, then all w."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a + b, a - b], -1) * 2**-0.5


def _channel_rates(theta: Tensor, theta_prime: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rates over (u, w) for keys behind and for keys ahead of the query, each [H, 1, K]."""
    slow, fast = theta_prime[:, None] - theta, theta_prime[:, None] + theta  # [H, K/2]
    return torch.cat([slow, fast], -1)[:, None].to(dtype), torch.cat([fast, slow], -1)[:, None].to(dtype)


def _attend_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    behind: Tensor,
    ahead: Tensor,
    query_seg: Tensor,
    key_seg: Tensor,
    offset: int,
    reach: int,
) -> Tensor:
    """q [B, H, N, K] against k, v [B, H, M, K], whose token `offset` is the first query -> [B, H, N, K]."""
    visible = query_seg[:, None, :, None] == key_seg[:, None, None, :]  # [B, 1, N, M]
    if reach < k.shape[2]:
        distance = _places(q, offset) - _places(k, 0).mT  # [N, M]
        visible = visible & (distance.abs() <= reach)
    scores = _block_scores(q, k, behind, ahead, offset).masked_fill_(~visible, float("-inf"))
    return scores.softmax(-1) @ v


def _block_scores(q: Tensor, k: Tensor, behind: Tensor, ahead: Tensor, offset: int) -> Tensor:
    """q [B, H, N, K], k [B, H, M, K], whose token `offset` is the first query -> logits [B, H, N, M]."""
    count, end = q.shape[2], offset + q.shape[2]
    pieces = []
    if offset:
        near, far = _places(q, 0), _places(k[:, :, :offset], -offset)  # from the first query on
        pieces.append(_decayed(q, behind, near) @ _decayed(k[:, :, :offset], behind, -far).mT)
    here = _places(q, -(count - 1) / 2)
    own = k[:, :, offset:end]
    later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
    # Where it isn't used, a product may be huge, but it stays finite: the exponents there add up to 64 at most.
    pieces.append(
        torch.where(
            later,
            _decayed(q, ahead, -here) @ _decayed(own, ahead, here).mT,
            _decayed(q, behind, here) @ _decayed(own, behind, -here).mT,
        )
    )
    if end < k.shape[2]:
        near, far = _places(q, 1 - count), _places(k[:, :, end:], 1)  # from the last query on
        pieces.append(_decayed(q, ahead, -near) @ _decayed(k[:, :, end:], ahead, far).mT)
    return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def _places(x: Tensor, first: float) -> Tensor:
    """Positions of the tokens of x [B, H, n, K], counted from `first`: [n, 1]."""
    return torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] + first


def _decayed(x: Tensor, rates: Tensor, distance: Tensor) -> Tensor:
    """x [B, H, n, K] * exp(-rates [H, 1, K] * distance [n, 1])."""
    return x * (-rates * distance).exp()
