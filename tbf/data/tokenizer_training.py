"""Trains a SentencePiece model within bounded memory, the same one for the same words.

Pieces never cross white space, so word counts are all that training needs: the stream is counted, rare words are
forgotten when the table is full, and SentencePiece sees each word once with its count.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable

import sentencepiece

from tbf.data.tokenizer import SPECIAL_TOKENS
from tbf.errors import ConfigError, DataError

log = logging.getLogger(__name__)

MODEL_TYPES = ("unigram", "bpe")
THREADS = 4
"""Fixed: the sums of unigram training depend on it."""
LONGEST_WORD = 128
"""Characters; longer runs without a space are no words."""


class WordCounter:
    """Counts words of a stream, keeping at most `max_words` different ones (about 200 bytes each).

    When the table is full the rarest words are dropped, so the words that matter for a vocabulary keep their counts.
    """

    def __init__(self, max_words: int = 2_000_000) -> None:
        self.max_words = max_words
        self.counts: Counter[str] = Counter()
        self.floor = 0

    def add(self, text: str) -> None:
        self.counts.update(text.split())
        while len(self.counts) > self.max_words:
            self.floor += 1
            self.counts = Counter({word: n for word, n in self.counts.items() if n > self.floor})

    def lines(self) -> list[str]:
        """`word<TAB>count` by count, then word: the order of the stream does not matter while nothing is dropped."""
        kept = (
            (word, n)
            for word, n in self.counts.items()
            if len(word) <= LONGEST_WORD and not any(special in word for special in SPECIAL_TOKENS)
        )
        lines = (f"{word}\t{n}" for word, n in sorted(kept, key=lambda item: (-item[1], item[0])))
        return [line.encode("utf-8", "ignore").decode("utf-8") for line in lines]  # no lone surrogates


def train_model(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "unigram",
    *,
    character_coverage: float = 0.9995,
    max_words: int = 2_000_000,
) -> bytes:
    """Returns the bytes of a SentencePiece model with byte fallback, split digits and NFKC.

    Args:
        vocab_size: ids wanted, the 5 special and 256 byte ones included; a text that cannot fill it gives fewer,
            which is logged once.
        character_coverage: share of the characters that get an own id; the others are spelled in bytes.

    Raises:
        DataError: no words in `texts`.
        ConfigError: an unknown `model_type`, or a vocabulary too small for bytes and characters.
    """
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type={model_type!r} is unknown; use {' or '.join(MODEL_TYPES)}")
    counter = WordCounter(max_words)
    for text in texts:
        counter.add(text)
    lines = counter.lines()
    if not lines:
        raise DataError("no words to train a tokenizer on; give a source with text")
    counter.counts.clear()
    log.info("tokenizer: training on %s different words", f"{len(lines):,}")
    wanted = vocab_size
    while True:
        try:
            model = _train(lines, wanted, model_type, character_coverage)
            break
        except RuntimeError as error:
            wanted = _possible_size(str(error), wanted)
    if wanted != vocab_size:
        log.warning("tokenizer: this text supports %d ids, not the %d asked for; using %d", wanted, vocab_size, wanted)
    return model


def _train(lines: list[str], vocab_size: int, model_type: str, character_coverage: float) -> bytes:
    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    model = io.BytesIO()  # in memory: a path would become part of the model and of its fingerprint
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        input_format="tsv",
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=character_coverage,
        normalization_rule_name="nmt_nfkc",  # NFKC that also folds white space and drops control characters
        byte_fallback=True,
        split_digits=True,
        num_threads=THREADS,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=pad,
        unk_piece=unk,
        bos_piece=cls,
        eos_piece=sep,
        control_symbols=[mask],
        minloglevel=2,
    )
    return model.getvalue()


def _possible_size(message: str, wanted: int) -> int:
    """Reads the largest possible vocabulary out of SentencePiece's complaint."""
    if match := re.search(r"value <= (\d+)", message):
        return int(match.group(1))
    if match := re.search(r"(\d+) vs (\d+)", message):
        raise ConfigError(
            f"vocab_size={wanted} is too small: special tokens, bytes and characters alone need {match.group(2)}; "
            f"ask for at least {int(match.group(2)) + 1}"
        ) from None
    raise DataError(f"SentencePiece could not train a tokenizer: {message.strip()}") from None
