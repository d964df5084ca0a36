"""How well a model guesses hidden tokens of a text: masked-LM loss and accuracy, pseudo-perplexity.

Shapes: `B` windows of a batch, `T` tokens, `M` masked positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from tbf.data.masking import EMPTY, MaskSpec, mask_rows
from tbf.data.spanish import FUNCTION_WORDS
from tbf.data.tokenizer import SPECIAL_TOKENS, SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError
from tbf.evaluate.batches import by_length, padded
from tbf.evaluate.windows import Window

if TYPE_CHECKING:
    from tbf.model.encoder import TormentedBertFrankenstein

CLASSES = ("function words", "content words", "numbers", "punctuation")
_SPACE = "\u2581"


class Guesses(NamedTuple):
    """What a model made of hidden tokens, one entry each."""

    nll: np.ndarray
    """float64: -log p of the hidden token, in nats."""
    right: np.ndarray
    """bool: was it the likeliest one?"""
    kind: np.ndarray
    """int64: which of CLASSES its word belongs to."""


def masked_lm(
    model: TormentedBertFrankenstein,
    tokenizer: SpanishSPMTokenizer,
    windows: Sequence[Window],
    *,
    rate: float = 0.15,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """Hides `rate` of each window's tokens behind [MASK] and scores the guesses: loss in nats, accuracy, both by class.

    The same text, rate and seed hide the same tokens, whatever the batches. Raises DataError without a token to hide.
    """
    _check_batch(batch_size)
    spec = MaskSpec.for_tokenizer(tokenizer, rate, 1.0, 0.0, seed=seed)
    batches = _masked_batches(windows, spec, batch_size)
    found = _score(model, tokenizer, windows, batches, "masked", sum(map(_scored, windows)), progress)
    return {"masked_tokens": len(found.nll), **_summary(found), "by_class": _by_class(found)}


def pseudo_likelihood(
    model: TormentedBertFrankenstein,
    tokenizer: SpanishSPMTokenizer,
    windows: Sequence[Window],
    *,
    tokens: int,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """exp of the mean -log p of a token given all others of its window (pseudo-perplexity, arXiv 1910.14659).

    Each token costs a row of its own, so `tokens` of them are drawn at random from all (all, when there are fewer);
    `pseudo_perplexity_error` is one standard error. Raises DataError without any token.
    """
    _check_batch(batch_size)
    counts = np.array([_scored(window) for window in windows], dtype=np.int64)
    total = int(counts.sum())
    drawn = np.sort(np.random.default_rng(seed).permutation(total)[:tokens])
    starts = np.cumsum(counts) - counts
    owner = np.searchsorted(starts, drawn, side="right") - 1
    places = [(int(w), int(n - starts[w]) + windows[w].first) for w, n in zip(owner, drawn)]
    batches = _single_batches(windows, places, tokenizer.mask_id, batch_size)
    found = _score(model, tokenizer, windows, batches, "one by one", len(places), progress)
    mean = float(found.nll.mean())
    error = float(found.nll.std() / math.sqrt(len(found.nll))) if len(found.nll) < total else 0.0
    return {
        "pseudo_tokens": len(found.nll),
        "pseudo_perplexity": math.exp(mean),
        "pseudo_perplexity_error": math.exp(mean) * error,
    }


class _Batch(NamedTuple):
    ids: np.ndarray  # [B, T], with the hidden tokens hidden
    real: np.ndarray  # [B, T], 1 at tokens
    positions: np.ndarray  # [B, M]
    labels: np.ndarray  # [B, M], EMPTY in unused slots
    windows: list[int]  # [B]
    done: int  # by how much the progress moves on


def _masked_batches(windows: Sequence[Window], spec: MaskSpec, size: int) -> Iterator[_Batch]:
    for chosen in by_length([len(window.ids) for window in windows], size):
        rows = [windows[i] for i in chosen]
        ids, real = padded([row.ids for row in rows])
        place = np.arange(ids.shape[1])
        first, end = (np.array([getattr(row, name) for row in rows])[:, None] for name in ("first", "end"))
        candidates = ((place >= first) & (place < end)).astype(np.int64)
        zeros = np.zeros(len(chosen), np.int64)
        inputs, positions, labels = mask_rows(ids, candidates, zeros, np.array(chosen), spec)
        yield _Batch(inputs, real, positions, labels, chosen, sum(map(_scored, rows)))


def _single_batches(
    windows: Sequence[Window], places: list[tuple[int, int]], mask_id: int, size: int
) -> Iterator[_Batch]:
    for numbers in by_length([len(windows[window].ids) for window, _ in places], size):
        chosen = [places[number] for number in numbers]
        ids, real = padded([windows[window].ids for window, _ in chosen])
        positions = np.array([position for _, position in chosen])[:, None]
        labels = np.take_along_axis(ids, positions, 1)
        np.put_along_axis(ids, positions, mask_id, 1)
        yield _Batch(ids, real, positions, labels, [window for window, _ in chosen], len(chosen))


@torch.inference_mode()
def _score(
    model: TormentedBertFrankenstein,
    tokenizer: SpanishSPMTokenizer,
    windows: Sequence[Window],
    batches: Iterator[_Batch],
    name: str,
    total: int,
    progress: bool,
) -> Guesses:
    device = next(model.parameters()).device
    model.eval()
    kinds = WordClasses(tokenizer)
    nll, right, kind = [], [], []
    with tqdm(total=total, unit=" tokens", desc=name, disable=None if progress else True) as bar:
        for batch in batches:
            ids, real, positions, labels = (torch.from_numpy(array).to(device) for array in batch[:4])
            out = model(ids, segment_ids=real, masked_positions=positions, masked_labels=labels)
            filled = labels != EMPTY
            logits, wanted = out.logits[filled].float(), labels[filled]
            nll.append(F.cross_entropy(logits, wanted, reduction="none").double().cpu().numpy())
            right.append((logits.argmax(-1) == wanted).cpu().numpy())
            for window, row, used in zip(batch.windows, batch.positions, batch.labels != EMPTY):
                kind.append(kinds.of(windows[window].ids)[row[used]])
            bar.update(batch.done)
    found = Guesses(*(np.concatenate(parts) if parts else np.empty(0) for parts in (nll, right, kind)))
    if not len(found.nll):
        raise DataError("there is no token to score; give some text")
    return found


class WordClasses:
    """Tells the classes of a row's tokens from the words they spell: no tagger, so content words are all the rest."""

    def __init__(self, tokenizer: SpanishSPMTokenizer) -> None:
        self._pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """ids [T] -> the number of a class for each, int64 [T]; special tokens count as punctuation."""
        pieces = [self._pieces[i] if i >= len(SPECIAL_TOKENS) else "" for i in ids]
        starts = [i for i, piece in enumerate(pieces) if i == 0 or not piece or piece.startswith(_SPACE)]
        result = np.empty(len(ids), dtype=np.int64)
        for start, end in zip(starts, [*starts[1:], len(ids)]):
            word = "".join(pieces[start:end]).lstrip(_SPACE)
            kind = _kind(word)
            for i in range(start, end):
                bare = pieces[i].strip(_SPACE)
                spelled = any(letter.isalnum() for letter in bare) or (bare == "" and kind < 3)
                result[i] = kind if spelled else CLASSES.index("punctuation")
        return result


def _kind(word: str) -> int:
    letters = "".join(letter for letter in word.lower() if letter.isalnum())
    if not letters:
        return CLASSES.index("punctuation")
    if any(letter.isdigit() for letter in letters):
        return CLASSES.index("numbers")
    return CLASSES.index("function words" if letters in FUNCTION_WORDS else "content words")


def _summary(found: Guesses) -> dict[str, float]:
    return {"loss": float(found.nll.mean()), "masked_accuracy": float(found.right.mean())}


def _by_class(found: Guesses) -> dict[str, dict[str, float]]:
    parts = {}
    for number, name in enumerate(CLASSES):
        chosen = found.kind == number
        if chosen.any():
            part = Guesses(*(values[chosen] for values in found))
            parts[name] = {"masked_tokens": int(chosen.sum()), **_summary(part)}
    return parts


def _scored(window: Window) -> int:
    return window.end - window.first


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
