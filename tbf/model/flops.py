"""Counts parameters and floating-point operations by part, from the modules themselves (on the meta device).

Shapes: `T` row length, `H` heads, `K` head width, `C` chunk length of the scans.
"""

from __future__ import annotations

from collections import Counter

import torch

from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.ops.hope import BLOCK as HOPE_BLOCK

SCAN_CHUNK = 64
"""Chunk length of `ops.decay_scan`, for the operation count."""


def build_meta(config: UltraConfig) -> TormentedBertFrankenstein:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return TormentedBertFrankenstein(config)


def parameters_by_part(config: UltraConfig) -> dict[str, int]:
    """Parameter counts of embeddings, each kind of mixer, FFNs, norms and head; their sum is the model's."""
    counts: Counter[str] = Counter()
    for name, parameter in build_meta(config).named_parameters():
        counts[_part(name, config)] += parameter.numel()
    return dict(counts)


def forward_flops_per_token(config: UltraConfig, seq_len: int, masked_share: float = 0.3) -> dict[str, float]:
    """Operations (2 per multiply-add) of one forward pass per token of a row of `seq_len`, by part.

    Counts matrix products only: every projection at each visit, the experts that a token reaches, sequence mixing, and
    the head on `masked_share` of the positions.
    """
    flops: Counter[str] = Counter()
    for name, parameter in build_meta(config).named_parameters():
        part = _part(name, config)
        if parameter.ndim < 2 or "norm" in name or name.startswith("loop_start"):
            continue
        visits = config.num_loops if name.startswith("layers.") else 1
        if part == "ode":
            visits *= ode_evaluations(config)
        share = 1.0
        if part == "head":
            share = masked_share
        elif name == "embeddings.table.weight":  # looked up, then used as the output projection
            part, share = "head", masked_share * config.vocab_size / config.padded_vocab_size
        elif config.use_moe and parameter.ndim == 3 and ".ffn." in name:
            share = config.top_k_experts / config.num_experts
        flops[part] += 2.0 * parameter.numel() * visits * share
    for mixer, window in config.layer_types:
        flops[mixer] += config.num_loops * mixing_flops_per_token(config, mixer, window, seq_len)
    return dict(flops)


def training_flops_per_token(config: UltraConfig, seq_len: int, masked_share: float = 0.3) -> float:
    """Three forward passes' worth: recomputation is a cost of memory, not useful work."""
    return 3.0 * sum(forward_flops_per_token(config, seq_len, masked_share).values())


def ode_evaluations(config: UltraConfig) -> int:
    """Evaluations of the vector field per visit of an ODE layer."""
    return (4 if config.ode_solver == "rk4" else 1) * config.ode_steps


def mixing_flops_per_token(config: UltraConfig, mixer: str, window: int, seq_len: int) -> float:
    """Operations that move information between tokens, per token and visit."""
    keys = min(seq_len, window) if window else seq_len
    width = config.hidden_size
    if mixer == "retnet":
        k = config.retention_head_dim
        return _scan_flops(seq_len, config.retention_heads, k, k, score_products=config.retention_heads)
    if mixer == "mamba":  # both directions have scores of their own, one set for all heads
        heads, state, value = config.mamba_heads, config.mamba_state_size, config.mamba_head_dim
        second_direction = 2.0 * min(SCAN_CHUNK, seq_len) * value * heads
        return second_direction + _scan_flops(seq_len, heads, state, value, score_products=2)
    attention = 4.0 * keys * width
    if mixer == "ode":
        return attention * ode_evaluations(config)
    if mixer == "titan_attn" and config.use_hope:
        attention += 2.0 * min(keys, HOPE_BLOCK) * width  # a block itself needs a product for each direction
    if mixer == "titan_attn" and config.titan_memory == "linear":
        k, c = config.head_dim, min(config.titan_chunk_size, seq_len)
        attention += 2 * config.num_heads * (4 * c * k + 18 * k * k + 2 * c * c)
    return attention


def _scan_flops(seq_len: int, heads: int, key_dim: int, value_dim: int, score_products: int) -> float:
    chunk = min(SCAN_CHUNK, seq_len)
    intra = 2.0 * chunk * (key_dim * score_products + value_dim * heads)
    states = 2 * 4.0 * key_dim * value_dim * heads  # two directions, each writes and reads the state
    return intra + states


def _part(name: str, config: UltraConfig) -> str:
    """The part of the model that a parameter's name belongs to."""
    if not name.startswith("layers."):
        return {"embeddings": "embeddings", "head": "head"}.get(name.partition(".")[0], "norms")
    _, index, block, *_ = name.split(".")
    if block == "mixer":
        return config.layer_types[int(index)][0]
    return "ffn" if block == "ffn" else "norms"
