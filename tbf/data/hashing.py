"""Counter-based randomness: a random number is a hash of where it is used, so any process can draw it at any time.

`mix` is the finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that passes BigCrush
when fed with a counter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_TURNS = np.arange(6, dtype=np.uint64)  # of the Feistel network


def mix(values: Any) -> np.ndarray:
    """Hashes uint64 values, any shape."""
    with np.errstate(over="ignore"):
        x = np.asarray(values, np.uint64) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _FIRST
        x = (x ^ (x >> np.uint64(27))) * _SECOND
        return x ^ (x >> np.uint64(31))


def key(*parts: Any) -> np.ndarray:
    """One 64-bit key from integers or integer arrays that broadcast; the order of the parts matters."""
    state = np.uint64(0)
    for part in parts:
        state = mix(state ^ mix(np.asarray(part).astype(np.uint64)))
    return state


def permute(positions: Any, size: int, permutation_key: Any) -> np.ndarray:
    """Where a random permutation of 0 .. size - 1 sends `positions`, without ever holding the permutation.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway 2002).

    Args:
        positions: integers [N] in 0 .. size - 1.
        permutation_key: names the permutation; a scalar or an array [N].
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    x = np.array(positions, np.uint64)
    keys = np.broadcast_to(np.asarray(permutation_key, np.uint64), x.shape)
    turns = mix(keys[:, None] ^ _TURNS)  # [N, turns]
    outside = np.arange(len(x))
    while len(outside):
        left, right = x[outside] >> shift, x[outside] & mask
        for turn in range(len(_TURNS)):
            left, right = right, left ^ (mix(right ^ turns[outside, turn]) & mask)
        x[outside] = (left << shift) | right
        outside = outside[x[outside] >= size]
    return x.astype(np.int64)
