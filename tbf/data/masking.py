"""Masked language modelling on the fly: which tokens of a row are hidden, and what stands in their place.

Shapes: B rows, T tokens a row, M slots for masked positions.
Every draw is a hash of (seed, epoch, row, position): the same row gets the same mask whatever the number of ranks,
workers and nodes. A row always hides the same share of its tokens (a fixed count, so shapes are static and the mean
loss has no sampling bias), as cramming does (2212.14034); [CLS], [SEP] and padding are never hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tbf.data.hashing import key, mix
from tbf.data.tokenizer import SPECIAL_TOKENS, SpanishSPMTokenizer
from tbf.errors import ConfigError

EMPTY = -100
"""Label of a slot that holds no masked position."""
_CHOICE, _KIND, _TOKEN = range(3)  # names of the independent draws


@dataclass(frozen=True)
class MaskSpec:
    """How rows are masked."""

    rate: float
    """Share of a row's ordinary tokens that are hidden."""
    vocab_size: int
    seed: int = 0
    mask_share: float = 0.8
    """Of the hidden tokens: replaced by [MASK]."""
    random_share: float = 0.1
    """Of the hidden tokens: replaced by a random token. The rest stays as it is; all of them carry loss."""
    mask_id: int = SPECIAL_TOKENS.index("[MASK]")
    first_ordinary_id: int = len(SPECIAL_TOKENS)
    word_starts: np.ndarray | None = None
    """bool [vocab_size]; given, whole words are hidden (`SpanishSPMTokenizer.word_starts`)."""
    end_rate: float | None = None
    """Rate reached at `end_row` by a straight line from `rate` at `start_row`; None: `rate` throughout."""
    start_row: int = 0
    end_row: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "end_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise ConfigError(f"mask {name}={value} is no share; use a number between 0 and 1, e.g. 0.3")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1 + 1e-9:
            raise ConfigError(
                f"mask_share={self.mask_share} and random_share={self.random_share} must be shares of at most 1 in sum"
            )
        if self.end_rate is not None and self.end_row < self.start_row:
            raise ConfigError(f"the mask rate ends at row {self.end_row}, before its start {self.start_row}")

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: SpanishSPMTokenizer,
        rate: float,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        *,
        seed: int = 0,
        whole_words: bool = False,
        **options: Any,
    ) -> MaskSpec:
        """The spec for a tokenizer's ids; `options` are the remaining fields."""
        words = tokenizer.word_starts() if whole_words else None
        return cls(rate, tokenizer.vocab_size, seed, mask_share, random_share, word_starts=words, **options)

    def rate_at(self, position: int) -> float:
        """Rate at a global row position, in whole percents while it moves, so that shapes change rarely."""
        if self.end_rate is None or position <= self.start_row:
            return self.rate
        if position >= self.end_row:
            return self.end_rate
        passed = (position - self.start_row) / (self.end_row - self.start_row)
        return max(0.01, round(self.rate + (self.end_rate - self.rate) * passed, 2))

    def slots(self, seq_len: int, position: int = 0) -> int:
        """M: masked positions that a row of `seq_len` tokens can have at this point of the run."""
        return max(1, round(self.rate_at(position) * seq_len))


def mask_rows(
    input_ids: np.ndarray,
    segment_ids: np.ndarray,
    epochs: np.ndarray,
    rows: np.ndarray,
    spec: MaskSpec,
    *,
    position: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks a batch.

    Args:
        input_ids: int64 [B, T].
        segment_ids: [B, T], 0 is padding.
        epochs, rows: integers [B] that name the masks.
        position: global row position of the batch, for a moving rate.

    Returns:
        inputs int64 [B, T], positions int64 [B, M] ascending, labels int64 [B, M] (-100 in empty slots, at the end).
    """
    width = input_ids.shape[1]
    slots = spec.slots(width, position)
    names = key(spec.seed, epochs, rows)[:, None]  # [B, 1]
    places = np.arange(width, dtype=np.uint64)  # [T]
    candidates = (segment_ids > 0) & (input_ids >= spec.first_ordinary_id)  # [B, T]
    available = candidates.sum(1)
    wanted = np.minimum(np.maximum(np.rint(spec.rate_at(position) * available).astype(np.int64), 1), slots)
    wanted = np.minimum(wanted, available)  # [B]

    order = mix(key(names, _CHOICE) ^ mix(places)) >> np.uint64(1)  # [B, T]
    if spec.word_starts is None:
        order[~candidates] = np.uint64(2**64 - 1)
        chosen = np.argsort(order, axis=1)[:, :slots]  # [B, M]
        filled = np.arange(slots) < wanted[:, None]
    else:
        chosen, filled = _whole_words(order, candidates, spec.word_starts[input_ids], wanted, slots)

    positions = np.sort(np.where(filled, chosen, width), axis=1)  # empty slots last
    filled = positions < width
    positions = np.where(filled, positions, 0)
    tokens = np.take_along_axis(input_ids, positions, 1)
    labels = np.where(filled, tokens, EMPTY)

    drawn = mix(key(names, _KIND) ^ mix(positions.astype(np.uint64))).astype(np.float64) / 2.0**64
    ordinary = spec.vocab_size - spec.first_ordinary_id
    other = mix(key(names, _TOKEN) ^ mix(positions.astype(np.uint64))) >> np.uint64(32)
    other = spec.first_ordinary_id + ((other * np.uint64(ordinary)) >> np.uint64(32)).astype(np.int64)
    shown = np.where(drawn < spec.mask_share, spec.mask_id, tokens)
    shown = np.where((drawn >= spec.mask_share) & (drawn < spec.mask_share + spec.random_share), other, shown)
    inputs = input_ids.copy()
    row_numbers = np.broadcast_to(np.arange(len(inputs))[:, None], positions.shape)
    inputs[row_numbers[filled], positions[filled]] = shown[filled]
    return inputs, positions, labels


def _whole_words(
    order: np.ndarray, candidates: np.ndarray, starts: np.ndarray, wanted: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Takes words in random order as long as they fit into the row's count; (chosen [B, M], filled [B, M])."""
    chosen = np.zeros((len(order), slots), np.int64)
    filled = np.zeros((len(order), slots), bool)
    for row in range(len(order)):
        begins = candidates[row] & (starts[row] | ~np.roll(candidates[row], 1))
        begins[0] = candidates[row, 0]
        first = np.flatnonzero(begins)
        if not len(first):
            continue
        word = np.cumsum(begins) - 1  # [T], of the candidates only
        inside = np.flatnonzero(candidates[row])
        sizes = np.bincount(word[inside], minlength=len(first))
        picked, room = [], int(wanted[row])
        for number in np.argsort(order[row, first], kind="stable").tolist():
            size = int(sizes[number])
            if size <= room:
                picked.append(first[number] + np.arange(size))
                room -= size
                if not room:
                    break
        if picked:
            positions = np.concatenate(picked)
            chosen[row, : len(positions)] = positions
            filled[row, : len(positions)] = True
    return chosen, filled
