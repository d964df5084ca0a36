"""Decayed linear attention: the one kernel behind retention (2307.08621) and Mamba-2's SSD (2405.21060).

A token s reaches a token t of its document with weight exp(sum of the log decays between them), so that

    forward, inclusive   y_t = sum over s <= t of exp(g_{s+1} + ... + g_t) (q_t k_s) v_s
    which is             S_t = exp(g_t) S_{t-1} + k_t^T v_t,  y_t = q_t S_t,  with S = 0 where a document starts.

A row is cut in chunks. Inside a chunk the weights form a small matrix; between chunks the state S is passed on. Time
and memory are linear in T. Everything is masked before exp, and resets are masks too: a huge negative log decay in
their place would cancel in the cumulative sums.

Shapes: `B` batch, `T` tokens, `H` heads, `K` key width, `P` value width, `Z` chunks, `C` tokens per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRONGEST = -32.0
"""exp(-32) = 1e-14 forgets everything; larger sums inside a chunk would only cost the other tokens their precision."""


def decay_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    seg: Tensor,
    *,
    chunk_size: int = 64,
    reverse: bool = False,
    inclusive: bool = True,
) -> Tensor:
    """Decayed linear attention with a decay per head and token.

    q, k [B, T, H, K], or one head [B, T, 1, K] that all heads share; v [B, T, H, P]; log_decay [B, T, H] at most 0;
    seg [B, T] document ids >= 0 in contiguous runs -> [B, T, H, P]. Scale q or k outside.

    reverse: the mirror image, from the end of each document to its start.
    inclusive: whether a token reads its own key and value.
    """
    tokens, size = q.shape[1], _chunk(q.shape[1], q.shape[3], v.shape[3], chunk_size)
    q, k, v = (_chunked(t, size) for t in (q, k, v))  # [B, Z, H, C, .]
    g = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)).clamp(min=_STRONGEST)
    g = _chunked(g[..., None], size)[..., 0]  # [B, Z, H, C]
    seg = _chunked_segments(seg, size)  # [B, Z, 1, C]

    reach = _reach(seg, reverse)  # [B, Z, 1, C, C]
    # Decay since the document or chunk began. Not a cumsum: its rounding would carry one document into the next.
    age = (g @ reach[:, :, 0].mT.to(g.dtype))[..., None]  # [B, Z, H, C, 1]
    pairs = reach if inclusive else reach & ~torch.eye(size, dtype=torch.bool, device=g.device)
    weights = (age - age.mT).masked_fill_(~pairs, float("-inf")).exp_().to(q.dtype)
    y = ((q @ k.mT) * weights) @ v  # [B, Z, H, C, P]
    if q.shape[1] > 1:
        enters, leaves, carried = _links(seg, reverse)  # [B, Z, 1, C, 1], [B, Z, 1, C, 1], [B, Z, 1, 1, 1]
        total = age[..., :1, :] if reverse else age[..., -1:, :]  # [B, Z, H, 1, 1]
        leaving = (total - age).masked_fill(~leaves, float("-inf")).exp().to(q.dtype)
        written = (k * leaving).mT @ v  # [B, Z, H, K, P]
        states = _pass_states(written, (total.exp() * carried).to(q.dtype), reverse)
        y = y + (q * (age.exp() * enters).to(q.dtype)) @ states
    return _flat(y, tokens)


def retention_scan(q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, seg: Tensor, *, chunk_size: int = 64) -> Tensor:
    """Bidirectional retention, y_n = sum over m in the document of gamma^|n - m| (q_n k_m) v_m.

    q, k [B, T, H, K], v [B, T, H, P], log_gamma [H] below 0, seg [B, T] document ids >= 0 in contiguous runs
    -> [B, T, H, P]. With a constant decay both directions share one product inside the chunk; states pass both ways.
    """
    tokens, size = q.shape[1], _chunk(q.shape[1], q.shape[3], v.shape[3], chunk_size)
    q, k, v = (_chunked(t, size) for t in (q, k, v))  # [B, Z, H, C, .]
    seg = _chunked_segments(seg, size)  # [B, Z, 1, C]

    place = torch.arange(size, device=q.device, dtype=log_gamma.dtype)  # [C]
    rate = log_gamma[:, None]  # [H, 1]
    decay = (rate[..., None] * (place[:, None] - place).abs()).exp().to(q.dtype)  # [H, C, C]
    same = seg[..., :, None] == seg[..., None, :]  # [B, Z, 1, C, C]
    y = ((q @ k.mT) * (decay * same)) @ v
    if q.shape[1] > 1:
        for reverse in (False, True):
            enters, leaves, carried = _links(seg, reverse)
            distance = size - place if reverse else place + 1  # from the state that enters
            entering, leaving, through = (
                (rate * n).exp().to(q.dtype)[..., None] for n in (distance, size - distance, size)
            )  # [H, C, 1], [H, C, 1], [H, 1, 1]
            written = (k * (leaving * leaves)).mT @ v  # [B, Z, H, K, P]
            y = y + (q * (entering * enters)) @ _pass_states(written, through * carried, reverse)
    return _flat(y, tokens)


def _chunk(tokens: int, key_width: int, value_width: int, chunk_size: int) -> int:
    """Tokens per chunk: the whole row where the quadratic form needs no more multiplications than the chunked one.

    Per token and head these are T (K + P) against C (K + P) + 2 K P for writing and reading the state.
    """
    quadratic_until = chunk_size + 2 * key_width * value_width // (key_width + value_width)
    return tokens if tokens <= quadratic_until else chunk_size


def _chunked(x: Tensor, size: int) -> Tensor:
    """[B, T, H, n] -> [B, Z, H, C, n], zeros behind the last token."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (-1, size)).transpose(2, 3).contiguous()


def _chunked_segments(seg: Tensor, size: int) -> Tensor:
    """[B, T] -> [B, Z, 1, C]; the tokens that fill up the last chunk are a document of their own."""
    return torch.nn.functional.pad(seg, (0, -seg.shape[1] % size), value=-1).unflatten(1, (-1, 1, size))


def _flat(y: Tensor, tokens: int) -> Tensor:
    """[B, Z, H, C, P] -> [B, T, H, P]."""
    return y.transpose(2, 3).flatten(1, 2)[:, :tokens]


def _reach(seg: Tensor, reverse: bool) -> Tensor:
    """[B, Z, 1, C] -> [B, Z, 1, C, C] bool: which tokens s (last) of a chunk reach which tokens t, also t = s."""
    order = torch.ones(seg.shape[-1], seg.shape[-1], dtype=torch.bool, device=seg.device)
    order = order.triu() if reverse else order.tril()
    return order & (seg[..., :, None] == seg[..., None, :])


def _links(seg: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Documents across chunk edges, all bool: tokens that read the entering state [B, Z, 1, C, 1], tokens that write to
    the leaving one [B, Z, 1, C, 1], chunks that a state survives [B, Z, 1, 1, 1]."""
    edge = seg[..., :1] if reverse else seg[..., -1:]  # document that leaves each chunk, [B, Z, 1, 1]
    nowhere = torch.full_like(edge[:, :1], -2)
    before = torch.cat([edge[:, 1:], nowhere] if reverse else [nowhere, edge[:, :-1]], 1)
    return (seg == before)[..., None], (seg == edge)[..., None], (edge == before)[..., None]


def _pass_states(written: Tensor, carry: Tensor, reverse: bool) -> Tensor:
    """States that enter each chunk [B, Z, H, K, P], from what each writes and the share of it that a chunk lets
    through, carry [B, Z, H, 1, 1]. A loop: a closed form over all pairs of chunks would cost Z^2."""
    fresh, keep = written.unbind(1), carry.unbind(1)
    state, entering = torch.zeros_like(fresh[0]), []
    for z in reversed(range(len(fresh))) if reverse else range(len(fresh)):
        entering.append(state)
        state = torch.addcmul(fresh[z], keep[z], state)
    return torch.stack(entering[::-1] if reverse else entering, 1)
