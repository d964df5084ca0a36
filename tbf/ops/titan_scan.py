"""Neural memory of Titans (arXiv 2501.00663) with a matrix per head, in closed form per chunk.

The memory M takes gradient steps on |k M - v|^2 along the document, with momentum eta, step size theta and forgetting
alpha, all given per token:

    S_t = eta_t S_{t-1} - theta_t 2 k_t^T (k_t A_t - v_t)        M_t = (1 - alpha_t) M_{t-1} + S_t        y_t = q_t M_t

As in the paper's parallel training, the gradient is taken at an anchor A_t: the memory before the first token of t's
chunk. Chunks are counted from the start of the document, so a packed document computes what it would alone.

The row is walked in windows of one chunk's width. A document that runs on into a window crosses exactly one of its
chunk edges there, so a window needs two anchors: the one it came with, and the memory at that edge. Given the anchors,
all is linear: with e_j = 2 (v_j - k_j A_j), products of forgetting L_beta and of momentum L_eta as lower triangular
matrices, and G = L_beta L_eta diag(theta), a window that starts with M0 and S0 has

    M_t = b_t M0 + f_t S0 + sum over j <= t of G_tj k_j^T e_j,   b_t = prod (1 - alpha),  m_t = prod eta,  f = L_beta m.

Shapes: `B` batch, `H` heads, `T` tokens, `K` head width, `Z` windows, `C` tokens per window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tbf.errors import ConfigError

_GATE_EPS = 1e-6
"""Gates are kept this far from the values whose logarithm is infinite."""


def titan_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    seg: Tensor,
    initial: Tensor,
    *,
    chunk_size: int = 64,
    reverse: bool = False,
) -> Tensor:
    """Reads y_t = q_t M_t of a memory that learns along each document: [B, H, T, K].

    q, k, v [B, H, T, K]; step size theta, momentum eta in [0, 1) and forgetting alpha in [0, 1], each [B, H, T];
    seg [B, T] document ids >= 0 in contiguous runs; initial [H, K, K], the memory at the start of every document.
    chunk_size is part of the function, not a speed setting. With unit keys, theta <= (1 - eta) / chunk_size is stable.

    reverse: from the end of each document to its start.

    Raises ConfigError when chunk_size is below 1.
    """
    if chunk_size < 1:
        raise ConfigError(f"titan_chunk_size is {chunk_size}; it must be at least 1")
    if reverse:
        q, k, v, theta, eta, alpha = (t.flip(2) for t in (q, k, v, theta, eta, alpha))
        y = titan_scan(q, k, v, theta, eta, alpha, seg.flip(1), initial, chunk_size=chunk_size)
        return y.flip(2)

    tokens = q.shape[2]
    chunk_size = min(chunk_size, tokens)  # shorter rows hold no chunk edge but the starts of documents
    missing = -tokens % chunk_size
    q, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(2, (-1, chunk_size)) for t in (q, k, v))  # [B, H, Z, C, K]
    theta, eta, alpha = (F.pad(t, (0, missing)).unflatten(2, (-1, chunk_size)) for t in (theta, eta, alpha))
    w = _windows(F.pad(seg, (0, missing), value=-1), theta, eta, alpha, chunk_size)
    memory, momentum, errors = _walk(w, k, v, initial)
    read = torch.where(w.ongoing, q @ memory, q @ initial[:, None])  # [B, H, Z, C, K]
    y = w.b * read + w.f * (q @ momentum) + ((q @ k.mT) * w.G) @ errors
    return y.flatten(2, 3)[:, :, :tokens]


class _Windows(NamedTuple):
    """What a window does to its memory, whatever the memory is. Last two dimensions [C, 1] unless said otherwise."""

    ongoing: Tensor
    """[B, 1, Z, C, 1] bool: the token's document began before the window."""
    early: Tensor
    """[B, 1, Z, C, 1] bool: so did its chunk."""
    b: Tensor
    m: Tensor
    f: Tensor
    G: Tensor
    """[B, H, Z, C, C]."""
    N: Tensor
    """[B, H, Z, C, C]: L_eta diag(theta), the same as G for the momentum."""


def _windows(seg: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, size: int) -> _Windows:
    """seg [B, T], gates [B, H, Z, C], T = Z C."""
    index = torch.arange(seg.shape[1], device=seg.device)  # [T]
    fresh = F.pad(seg[:, 1:] != seg[:, :-1], (1, 0), value=True)
    start = (fresh * index).cummax(1).values  # [B, T] where the token's document starts
    place = index - start
    ongoing, early = (
        t.unflatten(1, (1, -1, size, 1)) for t in (place > index % size, place % size > index % size)
    )  # [B, 1, Z, C, 1]
    run = start.unflatten(1, (1, -1, size))  # [B, 1, Z, C]
    order = torch.ones(size, size, dtype=torch.bool, device=seg.device).tril()
    reach = order & (run[..., :, None] == run[..., None, :])  # [B, 1, Z, C, C]

    def products(log_gate: Tensor) -> tuple[Tensor, Tensor]:
        """Products of a gate since the document or the window began [B, H, Z, C, 1], and between pairs of tokens."""
        # Not a cumsum: its rounding would carry one document into the next.
        age = (log_gate.transpose(1, 2) @ reach[:, 0].mT.to(log_gate.dtype)).transpose(1, 2)[..., None]
        return age.exp(), (age - age.mT).masked_fill(~reach, float("-inf")).exp()

    b, L_beta = products(torch.log1p(-alpha.clamp(max=1 - _GATE_EPS)))
    m, L_eta = products(eta.clamp(min=_GATE_EPS).log())
    m = m * ongoing
    N = L_eta * theta[..., None, :]
    return _Windows(ongoing, early, b, m, L_beta @ m, L_beta @ N, N)


def _walk(w: _Windows, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory and momentum that enter each window [B, H, Z, K, K], and the errors e of its tokens [B, H, Z, C, K]."""
    # The last early token of each window, as a row that picks it: [B, 1, Z, 1, C], zero where there is none.
    pick = (w.early & ~F.pad(w.early[..., 1:, :], (0, 0, 0, 1))).mT.to(k.dtype)
    start_errors = 2 * (v - k @ initial[:, None])
    late = w.ongoing & ~w.early
    at_edge = (
        pick @ w.b + 1 - pick.sum(-1, keepdim=True),  # [B, H, Z, 1, 1]
        pick @ w.f,
        (k * (pick @ w.G).mT).mT,  # [B, H, Z, K, C]
    )
    at_end = (w.b[..., -1:, :], w.f[..., -1:, :], w.m[..., -1:, :])
    into_memory, into_momentum = (k * w.G[..., -1:, :].mT).mT, (k * w.N[..., -1:, :].mT).mT  # [B, H, Z, K, C]
    stays = w.ongoing[..., -1:, :]  # [B, 1, Z, 1, 1]: the document that leaves the window had entered it

    memory = anchor = initial.expand(k.shape[0], *initial.shape)  # [B, H, K, K]
    momentum = torch.zeros_like(memory)
    memories, momenta, errors = [], [], []
    per_window = zip(*(t.unbind(2) for t in (
        k, v, start_errors, w.ongoing, late, stays, *at_edge, *at_end, into_memory, into_momentum
    )))  # fmt: skip
    for key, value, error, ongoing, second, stay, b_p, f_p, K_p, b_c, f_c, m_c, K_c, K_n in per_window:
        memories.append(memory)
        momenta.append(momentum)
        error = torch.where(ongoing, 2 * (value - key @ anchor), error)
        edge = b_p * memory + f_p * momentum + K_p @ error  # the memory at the chunk's edge inside the window
        error = torch.where(second, 2 * (value - key @ edge), error)
        errors.append(error)
        anchor = torch.where(stay, edge, initial)
        memory = b_c * torch.where(stay, memory, initial) + f_c * momentum + K_c @ error
        momentum = m_c * momentum + K_n @ error
    return torch.stack(memories, 2), torch.stack(momenta, 2), torch.stack(errors, 2)
