from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tbf.hf
from tbf.data.tokenizer import SpanishSPMTokenizer
from tests.export.tiny_runs import TEXT

TEXTS = [
    *TEXT,
    "",
    "¿Qué [MASK] es [MASK]?",
    "sin[MASK]espacio",
    "[SEP] no es [CLS]",
    "  dos   espacios\ny más ",
    "🙂 ñandú 42",
]


@pytest.fixture(scope="module")
def pair(exported: Path) -> tuple[tbf.hf.TbfTokenizer, SpanishSPMTokenizer]:
    return AutoTokenizer.from_pretrained(exported), SpanishSPMTokenizer.from_pretrained(exported)


def test_ids_are_those_of_our_own_tokenizer(pair: tuple) -> None:
    theirs, ours = pair
    assert isinstance(theirs, tbf.hf.TbfTokenizer)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)["input_ids"], text
    batch, expected = theirs(TEXTS, padding=True, return_tensors="pt"), ours.encode(TEXTS, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert all((batch[key] == expected[key]).all() for key in batch)


def test_special_tokens_and_sizes(pair: tuple) -> None:
    theirs, ours = pair
    names = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(theirs, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4]
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert theirs.model_max_length == 64
    assert len(theirs("hola " * 100, truncation=True)["input_ids"]) == 64


def test_pairs_and_special_tokens_mask(pair: tuple) -> None:
    theirs, ours = pair
    one, two = (ours.encode(text, add_special_tokens=False)["input_ids"] for text in TEXT[:2])
    assert theirs(*TEXT[:2])["input_ids"] == [2, *one, 3, *two, 3]
    mask = theirs(TEXT[0], return_special_tokens_mask=True)["special_tokens_mask"]
    assert mask == [1, *[0] * len(one), 1]


def test_decoding(pair: tuple) -> None:
    theirs, _ = pair
    for text in ["¿Qué es [MASK]?", *TEXT]:
        assert theirs.decode(theirs(text)["input_ids"][1:-1]) == text
    assert theirs.decode(theirs(TEXT[0])["input_ids"], skip_special_tokens=True) == TEXT[0]


def test_words_given_one_by_one(pair: tuple) -> None:
    """As token classification does it."""
    theirs, ours = pair
    ids = theirs(TEXT[0].split(), is_split_into_words=True)["input_ids"]
    assert ids == ours.encode(TEXT[0])["input_ids"]


def test_saved_and_loaded_again(pair: tuple, tmp_path: Path) -> None:
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert all(again(text)["input_ids"] == theirs(text)["input_ids"] for text in TEXTS)
    assert again.model_max_length == 64
    assert SpanishSPMTokenizer.from_pretrained(tmp_path).fingerprint == ours.fingerprint
