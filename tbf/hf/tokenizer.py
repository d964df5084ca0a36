"""SpanishSPMTokenizer behind the interface of transformers: the same ids, by the same code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, PythonBackend

from tbf.data.tokenizer import MODEL_FILE, SPECIAL_TOKENS, SpanishSPMTokenizer

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS


class TbfTokenizer(PythonBackend):
    """Wraps rows as [CLS] ... [SEP] and pairs as [CLS] ... [SEP] ... [SEP].

    As in SpanishSPMTokenizer, a literal `[MASK]` in a text is the mask, and no text turns into another special token.
    Tokens can't be added: the model's vocabulary is fixed.
    """

    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = str(vocab_file)
        self.sentencepiece = SpanishSPMTokenizer.from_pretrained(vocab_file)
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        for name, token in zip(names, SPECIAL_TOKENS):
            kwargs[name] = AddedToken(token, normalized=False, special=True)
        self._pieces = [self.sentencepiece.id_to_piece(i) for i in range(self.sentencepiece.vocab_size)]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        kwargs.setdefault("special_tokens_pattern", "cls_sep")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return [self._pieces[i] for i in self.sentencepiece.encode(text, add_special_tokens=False)["input_ids"]]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sentencepiece.decode([self._convert_token_to_id(t) for t in tokens], skip_special_tokens=False)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = f"{filename_prefix}-{MODEL_FILE}" if filename_prefix else MODEL_FILE
        path = Path(save_directory) / name
        path.write_bytes(self.sentencepiece.model)
        return (str(path),)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self.sentencepiece.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]
