"""SpanishSPMTokenizer: text <-> token ids with a SentencePiece model (1808.06226).

Ids 0-4 are always [PAD] [UNK] [CLS] [SEP] [MASK]. Text never turns into one of them, except that `encode` (not the
shard writer) takes a literal `[MASK]` for the mask id, so that people can ask a model to fill a gap.
White space is folded to single spaces and text is normalised to NFKC.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from tbf.data.files import make_folder, write_bytes, write_json
from tbf.data.words import WordEncoder
from tbf.errors import ConfigError, DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
_SPACE = "\u2581"  # how SentencePiece writes the space before a word


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest little-endian type that holds the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


class SpanishSPMTokenizer:
    """A SentencePiece tokenizer with BERT's special tokens.

    Build one with `train`, `from_pretrained` or from the bytes of a SentencePiece model.

    Raises:
        DataError: the bytes are no SentencePiece model, or ids 0-4 are not the special tokens.
    """

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        self.model = model
        self._sp = sentencepiece.SentencePieceProcessor()
        cure = "train one with `tbf tokenizer train`, or copy the file again"
        try:
            if not model:
                raise RuntimeError("the file is empty")
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError as error:
            reason = str(error).split("\n")[0].strip()
            raise DataError(f"{origin}: not a SentencePiece model ({reason}); {cure}") from None
        found = tuple(self._sp.id_to_piece(i) for i in range(min(len(SPECIAL_TOKENS), self._sp.vocab_size())))
        if found != SPECIAL_TOKENS:
            raise DataError(
                f"{origin}: ids 0-4 must be {' '.join(SPECIAL_TOKENS)}, found {' '.join(found)}; "
                "train one with `tbf tokenizer train`"
            )
        self._words = WordEncoder(self._sp, token_dtype(self.vocab_size))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, model_type: str = "unigram", **options: Any
    ) -> SpanishSPMTokenizer:
        """Trains on an iterable of texts (read once); see `tbf.data.tokenizer_training.train_model` for the options."""
        from tbf.data.tokenizer_training import train_model

        return cls(train_model(texts, vocab_size, model_type, **options))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SpanishSPMTokenizer:
        """Loads a folder with `tokenizer.model`, or a `.model` file.

        Raises:
            DataError: nothing there, or the file is malformed or not the one that the folder's config describes.
        """
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        try:
            model = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: no tokenizer there ({error.strerror}); give a folder with {MODEL_FILE} or a .model file, "
                "or train one with `tbf tokenizer train`"
            ) from None
        tokenizer = cls(model, str(file))
        config = file.with_name(CONFIG_FILE)
        if path.is_dir() and config.exists():
            try:
                expected = json.loads(config.read_text(encoding="utf-8")).get("sha256")
            except (ValueError, AttributeError) as error:
                raise DataError(f"{config}: malformed ({error}); save the tokenizer again or delete the file") from None
            if expected not in (None, tokenizer.fingerprint):
                raise DataError(
                    f"{file}: sha256 {tokenizer.fingerprint[:12]} differs from {expected[:12]} in {CONFIG_FILE}; "
                    "the two files belong to different tokenizers: copy the whole folder again"
                )
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `tokenizer_config.json` and, last, `tokenizer.model` into `folder`."""
        folder = make_folder(Path(folder))
        config = {
            "tokenizer_class": type(self).__name__,
            "vocab_size": self.vocab_size,
            "special_tokens": {name: i for i, name in enumerate(SPECIAL_TOKENS)},
            "sha256": self.fingerprint,
        }
        write_json(folder / CONFIG_FILE, config)
        write_bytes(folder / MODEL_FILE, self.model)
        return folder

    pad_id, unk_id, cls_id, sep_id, mask_id = range(5)

    @property
    def vocab_size(self) -> int:
        return self._sp.vocab_size()

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def fingerprint(self) -> str:
        """sha256 of the model file: two tokenizers with the same fingerprint give the same ids."""
        return hashlib.sha256(self.model).hexdigest()

    def id_to_piece(self, token: int) -> str:
        return self._sp.id_to_piece(int(token))

    def word_starts(self) -> np.ndarray:
        """bool [vocab_size]: does this token begin a word? Needed by whole-word masking."""
        return np.array([self._sp.id_to_piece(i).startswith(_SPACE) for i in range(self.vocab_size)])

    def byte_tokens(self) -> np.ndarray:
        """bool [vocab_size]: is this token one raw byte of a character outside the vocabulary?"""
        return np.array([self._sp.is_byte(i) for i in range(self.vocab_size)])

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts without special tokens."""
        return [self._encode_words(text) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same ids for megabytes of text at a time: (ids of all texts, where each text ends among them)."""
        return self._words.encode(texts)

    def _encode_words(self, text: str) -> list[int]:
        # Word by word: in a whole text SentencePiece's sums of scores could break a tie between two spellings of a word
        # by what stands before it.
        return list(itertools.chain.from_iterable(self._sp.encode(text.split())))

    def encode(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        max_length: int | None = None,
        padding: bool | str = True,
        truncation: bool = True,
        add_special_tokens: bool = True,
    ) -> dict[str, Any]:
        """Returns `input_ids` and `attention_mask` (1 token, 0 padding) of one text or a list of texts.

        Args:
            return_tensors: "pt" gives int64 tensors [B, T]; None gives lists of ints (nested for a list of texts).
            max_length: at most this many tokens, the special ones included.
            padding: True to the longest of the list, "max_length" to `max_length`, False not at all.
            truncation: cut at `max_length`, keeping [SEP] last; False raises DataError for a longer text.
            add_special_tokens: wrap as [CLS] ... [SEP].
        """
        single = isinstance(text, str)
        rows = [self._encode_one(t) for t in ([text] if single else text)]
        extra = 2 if add_special_tokens else 0
        if max_length is not None:
            if max_length <= extra:
                raise ConfigError(f"max_length={max_length} leaves no room for text; use at least {extra + 1}")
            longest = max((len(row) + extra for row in rows), default=0)
            if longest > max_length and not truncation:
                raise DataError(f"a text has {longest} tokens, more than max_length={max_length}; use truncation=True")
            rows = [row[: max_length - extra] for row in rows]
        if add_special_tokens:
            rows = [[self.cls_id, *row, self.sep_id] for row in rows]
        mask = [[1] * len(row) for row in rows]
        if padding:
            if padding == "max_length" and max_length is None:
                raise ConfigError('padding="max_length" needs max_length, e.g. max_length=512')
            width = max_length if padding == "max_length" else max((len(row) for row in rows), default=0)
            mask = [m + [0] * (width - len(m)) for m in mask]
            rows = [row + [self.pad_id] * (width - len(row)) for row in rows]
        if return_tensors is None:
            return {"input_ids": rows[0] if single else rows, "attention_mask": mask[0] if single else mask}
        if return_tensors != "pt":
            raise ConfigError(f'return_tensors="{return_tensors}" is unknown; use "pt" or None')
        import torch

        if len({len(row) for row in rows}) > 1:
            raise ConfigError("texts of different lengths do not fit one tensor; use padding=True")
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}

    __call__ = encode

    def _encode_one(self, text: str) -> list[int]:
        mask = SPECIAL_TOKENS[self.mask_id]
        if mask not in text:
            return self._encode_words(text)
        # A character that nobody wrote stands for the mask: its neighbours are tokenised as if a word stood there.
        stand_in = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
        space = self._sp.piece_to_id(_SPACE)
        spelled = [i for i in self._sp.encode(stand_in) if i != space]
        ids: list[int] = []
        for token in self._encode_words(text.replace(mask, stand_in)):
            ids.append(token)
            if ids[-len(spelled) :] == spelled:
                del ids[-len(spelled) :]
                if ids and ids[-1] == space:
                    ids.pop()
                ids.append(self.mask_id)
        return ids

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str | list[str]:
        """Text of a list (or tensor) of ids; a list of texts for a nested list or a [B, T] tensor.

        Raises:
            DataError: an id outside the vocabulary.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and isinstance(ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens) for row in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise DataError(
                f"id {wrong} is outside the tokenizer's {self.vocab_size} ids; is it the model's tokenizer?"
            )
        if skip_special_tokens:
            return self._sp.decode([i for i in ids if i >= len(SPECIAL_TOKENS)])
        parts: list[str] = []
        run: list[int] = []
        for token in [*ids, self.pad_id]:  # the last one only flushes the run
            if token >= len(SPECIAL_TOKENS):
                run.append(token)
                continue
            if run:
                gap = " " if parts and self._sp.id_to_piece(run[0]).startswith(_SPACE) else ""
                parts.append(gap + self._sp.decode(run))
                run = []
            parts.append((" " if parts else "") + SPECIAL_TOKENS[token])
        return "".join(parts[:-1])
