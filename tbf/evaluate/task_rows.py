"""The rows of a task as token ids, and side by side as tensors.

Shapes: `B` rows of a batch, `T` tokens, `D` hidden, `K` things to label in a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.evaluate.batches import padded
from tbf.evaluate.tasks import Example, Task

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """An example as the model reads it."""

    ids: np.ndarray
    """int64 [T]"""
    places: np.ndarray
    """int64: the first token of each word; empty where the whole row is labelled."""
    target: np.ndarray
    states: np.ndarray | None = None
    """float32 [K, D]: what the head reads, where the encoder is frozen."""


class Batch(NamedTuple):
    """Rows side by side."""

    ids: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T], 1 at tokens."""
    rows: Tensor
    """[K]: the row of each place."""
    places: Tensor
    """[K]"""


def encode(tokenizer: SpanishSPMTokenizer, task: Task, examples: Sequence[Example], max_length: int) -> list[Row]:
    """Rows [CLS] text [SEP], or [CLS] first [SEP] second [SEP]. What is longer than a row is cut, which is logged."""
    rows, cut = [], 0
    for example in examples:
        parts = [ids or [tokenizer.unk_id] for ids in tokenizer.encode_ids(example.texts)]
        if task.kind == "token":
            room = max_length - 2
            starts = 1 + np.cumsum([0, *map(len, parts[:-1])])
            kept = starts <= room
            ids = [i for part in parts for i in part][:room]
            rows.append(Row(_wrapped(tokenizer, [ids]), starts[kept], example.target[kept]))
            cut += not kept.all()
        else:
            room = max_length - 1 - len(parts)
            cut += sum(map(len, parts)) > room
            while sum(map(len, parts)) > room:
                longest = max(parts, key=len)
                del longest[max(room - sum(map(len, parts)) + len(longest), room // len(parts)) :]
            rows.append(Row(_wrapped(tokenizer, parts), np.empty(0, np.int64), example.target))
    if cut:
        logger.warning("%d of %d rows were cut to %d tokens; words beyond are not scored", cut, len(rows), max_length)
    return rows


def side_by_side(rows: Sequence[Row], device: torch.device) -> Batch:
    """Rows as tensors on a device."""
    ids, mask = padded([row.ids for row in rows])
    owner = np.repeat(np.arange(len(rows)), [len(row.places) for row in rows])
    places = np.concatenate([row.places for row in rows])
    return Batch(*(torch.from_numpy(array).to(device) for array in (ids, mask, owner, places)))


def _wrapped(tokenizer: SpanishSPMTokenizer, parts: Sequence[Sequence[int]]) -> np.ndarray:
    ids = [tokenizer.cls_id]
    for part in parts:
        ids += [*part, tokenizer.sep_id]
    return np.array(ids, dtype=np.int64)
