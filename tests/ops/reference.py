"""Slow, direct forms of the operations: one token, one pair or one document at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def segments(*lengths: int) -> Tensor:
    """Documents 1, 2, ... of the given lengths, side by side in one row: [1, T]."""
    return torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))[None]


def random_segments(batch: int, tokens: int, documents: int, seed: int = 0) -> Tensor:
    """Rows of up to `documents` documents with edges anywhere: [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, documents + 1, (batch, tokens), generator=generator).sort(1).values


def decay_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, seg: Tensor, *, reverse: bool = False, inclusive: bool = True
) -> Tensor:
    """S = exp(g) S + k^T v and y = q S, token by token: q, k [B, T, H, K], v [B, T, H, P] -> [B, T, H, P]."""
    state = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype)
    outputs: list[Tensor] = [state] * q.shape[1]
    order = range(q.shape[1])[:: -1 if reverse else 1]
    for step, t in enumerate(order):
        if step:
            # A backward state decays by the gate of the token that reads it, like a forward one.
            state = state * (seg[:, t] == seg[:, order[step - 1]])[:, None, None, None]
        state = state * log_decay[:, t, :, None, None].exp()
        fresh = k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = torch.einsum("bhk,bhkp->bhp", q[:, t], state + fresh if inclusive else state)
        state = state + fresh
    return torch.stack(outputs, 1)


def retention_matrix(q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, seg: Tensor) -> Tensor:
    """The symmetric T x T matrix gamma^|n - m| inside documents, written out."""
    place = torch.arange(q.shape[1], dtype=q.dtype)
    decay = (log_gamma[:, None, None] * (place[:, None] - place).abs()).exp()  # [H, T, T]
    decay = decay * (seg[:, None, :, None] == seg[:, None, None, :])
    return torch.einsum("bhnm,bnhk,bmhk,bmhp->bnhp", decay, q, k, v)


def hope_pairwise(q: Tensor, k: Tensor, theta: Tensor, theta_prime: Tensor) -> Tensor:
    """HoPE's boost matrices pair by pair in FP64, unscaled: q, k [B, H, T, K] -> [B, H, T, T]."""
    q, k, theta, theta_prime = (t.double() for t in (q, k, theta, theta_prime))
    place = torch.arange(q.shape[2], dtype=torch.float64)
    distance = place[:, None] - place  # [T, T]
    near = torch.exp(distance.abs() * (theta[..., None, None] - theta_prime[:, None, None, None]))  # [H, K/2, T, T]
    far = torch.exp(-distance.abs() * (theta[..., None, None] + theta_prime[:, None, None, None]))
    cosh, sinh = (near + far) / 2, distance.sign() * (near - far) / 2  # damped
    a, b = q[..., 0::2], q[..., 1::2]
    x, y = k[..., 0::2], k[..., 1::2]
    same = torch.einsum("bhni,bhmi,himn->bhnm", a, x, cosh.mT) + torch.einsum("bhni,bhmi,himn->bhnm", b, y, cosh.mT)
    cross = torch.einsum("bhni,bhmi,himn->bhnm", a, y, sinh.mT) + torch.einsum("bhni,bhmi,himn->bhnm", b, x, sinh.mT)
    return same + cross


def masked_attention(scores: Tensor, v: Tensor, seg: Tensor, window: int = 0) -> Tensor:
    """softmax(scores / sqrt K) v over the documents of seg [B, T]: [B, H, T, K] in FP64."""
    place = torch.arange(v.shape[2])
    visible = seg[:, None, :, None] == seg[:, None, None, :]
    if window:
        visible = visible & ((place[:, None] - place).abs() <= window // 2)
    weights = (scores * v.shape[3] ** -0.5).masked_fill(~visible, float("-inf")).softmax(-1)
    return weights @ v.to(weights.dtype)


def titan_loop(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, seg: Tensor, initial: Tensor, chunk: int
) -> Tensor:
    """Titans' memory token by token, with autograd for the surprise: q, k, v [B, H, T, K] -> [B, H, T, K]."""
    y = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            memory, anchor, momentum, start = initial[head], initial[head], torch.zeros_like(initial[head]), 0
            for t in range(q.shape[2]):
                if t == 0 or seg[row, t] != seg[row, t - 1]:
                    memory, momentum, start = initial[head], torch.zeros_like(memory), t
                if (t - start) % chunk == 0:
                    anchor = memory
                at = (row, head, t)
                point = anchor.detach().requires_grad_()
                (surprise,) = torch.autograd.grad((k[at] @ point - v[at]).square().sum(), point)
                momentum = eta[at] * momentum - theta[at] * surprise
                memory = (1 - alpha[at]) * memory + momentum
                y[at] = q[at] @ memory
    return y
