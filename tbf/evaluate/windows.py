"""Texts of any length as windows that a model can read, each token scored once.

Windows of a long text start every `stride` tokens. Where two overlap, the first half of the overlap is scored in the
earlier window and the rest in the later one, so that every token is scored with context on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError


class Window(NamedTuple):
    """A piece of a text, as the model reads it."""

    ids: np.ndarray
    """int64 [T], with [CLS] and [SEP]."""
    first: int
    """Position of the first token that is scored here."""
    end: int
    """One past the last."""


def cut(tokenizer: SpanishSPMTokenizer, texts: Iterable[str], max_length: int, stride: int = 0) -> Iterator[Window]:
    """Windows of at most `max_length` tokens, [CLS] and [SEP] included; `stride` 0 takes three quarters of one.

    Texts without a token give none. Raises ConfigError for a stride that would leave tokens out.
    """
    room = max_length - 2
    if room < 2:
        raise ConfigError(f"max_length {max_length} leaves no room for text; use at least 4 tokens, e.g. 512")
    if not 0 <= stride <= room:
        raise ConfigError(f"stride {stride} must lie between 1 and {room}, the tokens of a window (max_length - 2)")
    stride = stride or max(1, 3 * room // 4)
    for text in texts:
        (ids,) = tokenizer.encode_ids([text])
        yield from _windows(tokenizer, ids, room, stride)


def _windows(tokenizer: SpanishSPMTokenizer, ids: Sequence[int], room: int, stride: int) -> Iterator[Window]:
    left = (room - stride) // 2  # tokens of the overlap that the later window leaves to the earlier one
    scored = start = 0
    while scored < len(ids):
        last = start + room >= len(ids)
        end = len(ids) if last else start + stride + left
        row = np.array([tokenizer.cls_id, *ids[start : start + room], tokenizer.sep_id], dtype=np.int64)
        yield Window(row, 1 + scored - start, 1 + end - start)
        scored, start = end, start + stride
