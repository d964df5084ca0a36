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
from typing import NamedTuple

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
SMALLEST_BLOCK = 32
RECOMPUTE_FROM = 2048
"""Keys per query from which the backward recomputes the scores instead of keeping them: B H T^2 numbers."""


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
    block_size = min(block_size, max(reach, SMALLEST_BLOCK))  # smaller windows waste less of each block
    near = -(-reach // block_size)  # blocks on either side that a token may reach
    decays = _Decays.build(theta, theta_prime, block_size, near * block_size, q.dtype)
    span = min(tokens, (2 * near + 1) * block_size)  # keys that a block looks at
    recompute = span >= RECOMPUTE_FROM and torch.is_grad_enabled()
    # Blocks are split off and joined: the gradient of a slice would be as long as the row, for every block.
    queries, keys, values = (t.split(block_size, 2) for t in (q, k, v))
    query_segs = seg.split(block_size, 1)
    outputs = []
    for i, query in enumerate(queries):
        first, last = max(0, i - near), min(len(queries), i + near + 1)
        key, value = (k, v) if last - first == len(queries) else (torch.cat(t[first:last], 2) for t in (keys, values))
        key_seg = seg[:, first * block_size : last * block_size]
        args = (query, key, value, decays, query_segs[i], key_seg, (i - first) * block_size, reach)
        if recompute:
            outputs.append(checkpoint(_attend_block, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend_block(*args))
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


def hope_scores(q: Tensor, k: Tensor, theta: Tensor, theta_prime: Tensor, *, block_size: int = BLOCK) -> Tensor:
    """Unscaled, unmasked logits: q, k [B, H, T, K] -> [B, H, T, T]. For inspection: memory is quadratic in T."""
    q, k = _light_cone(q), _light_cone(k)
    decays = _Decays.build(theta, theta_prime, block_size, q.shape[2], q.dtype)
    blocks = enumerate(q.split(block_size, 2))
    return torch.cat([_block_scores(block, k, decays, i * block_size) for i, block in blocks], 2)


def _light_cone(x: Tensor) -> Tensor:
    """Pairs (a, b) of the last dimension -> all u, then all w."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a + b, a - b], -1) * 2**-0.5


class _Decays(NamedTuple):
    """Factors of queries and keys, each [H, n, K] over (u, w); products of two of them are the decays of pairs."""

    behind_query: Tensor
    """From the first query of the block; its keys end one token earlier."""
    behind_key: Tensor
    ahead_query: Tensor
    """To the last query of the block; its keys start one token later."""
    ahead_key: Tensor
    own_behind_query: Tensor
    """From the centre of the block, as the rest."""
    own_behind_key: Tensor
    own_ahead_query: Tensor
    own_ahead_key: Tensor

    @classmethod
    def build(cls, theta: Tensor, theta_prime: Tensor, block: int, reach: int, dtype: torch.dtype) -> _Decays:
        """For blocks of `block` tokens and keys up to `reach` tokens outside of them."""
        slow, fast = theta_prime[:, None] - theta, theta_prime[:, None] + theta  # [H, K/2]
        behind, ahead = (torch.cat(pair, -1)[:, None].to(dtype) for pair in ((slow, fast), (fast, slow)))  # [H, 1, K]
        inside = torch.arange(block, device=theta.device, dtype=dtype)[:, None]  # [n, 1]
        outside = torch.arange(1, reach + 1, device=theta.device, dtype=dtype)[:, None]
        here = inside - (block - 1) / 2
        return cls(
            (-behind * inside).exp(), (-behind * outside.flip(0)).exp(),
            (-ahead * inside.flip(0)).exp(), (-ahead * outside).exp(),
            (-behind * here).exp(), (behind * here).exp(), (ahead * here).exp(), (-ahead * here).exp(),
        )  # fmt: skip


def _attend_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: _Decays,
    query_seg: Tensor,
    key_seg: Tensor,
    offset: int,
    reach: int,
) -> Tensor:
    """q [B, H, N, K] against k, v [B, H, M, K], whose token `offset` is the first query -> [B, H, N, K]."""
    visible = query_seg[:, None, :, None] == key_seg[:, None, None, :]  # [B, 1, N, M]
    if reach < k.shape[2]:
        place = torch.arange(k.shape[2], device=k.device)
        visible = visible & ((place[offset : offset + q.shape[2], None] - place).abs() <= reach)
    scores = _block_scores(q, k, decays, offset).masked_fill_(~visible, float("-inf"))
    return scores.softmax(-1) @ v


def _block_scores(q: Tensor, k: Tensor, decays: _Decays, offset: int) -> Tensor:
    """q [B, H, N, K], k [B, H, M, K], whose token `offset` is the first query -> logits [B, H, N, M]."""
    d, count = decays, q.shape[2]
    before, own, after = k.split([offset, count, k.shape[2] - offset - count], 2)
    later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
    # Where it isn't used, a product may be huge, but it stays finite: the exponents there add up to 64 at most.
    scores = torch.where(
        later,
        (q * d.own_ahead_query[:, :count]) @ (own * d.own_ahead_key[:, :count]).mT,
        (q * d.own_behind_query[:, :count]) @ (own * d.own_behind_key[:, :count]).mT,
    )
    pieces = [scores]
    if before.shape[2]:
        keys = before * d.behind_key[:, d.behind_key.shape[1] - offset :]
        pieces.insert(0, (q * d.behind_query[:, :count]) @ keys.mT)
    if after.shape[2]:  # only a whole block has keys after it
        pieces.append((q * d.ahead_query) @ (after * d.ahead_key[:, : after.shape[2]]).mT)
    return torch.cat(pieces, -1) if len(pieces) > 1 else scores
