from __future__ import annotations

import json
import logging
import pickle
import random

import pytest
import torch

from tbf.data.tokenizer import SPECIAL_TOKENS, SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError

EXACT = [
    "El pingüino comió ñandú, ¿verdad? ¡Sí, señor! Sarmiño, Cádiz, camión, vergüenza.",
    "Cuestan 3.141,59 € o 1,234,567.89; teléfono +34 600 123 456; año 2026.",
    "Visita https://ejemplo.es/ruta/ñ?q=café&p=1#fin o escribe a maría.lópez@correo.com.mx",
    "Qué risa 😂🤣 🇪🇸 👩‍👩‍👧‍👦 ❤️ y 👍🏽",
    "中文 العربية русский ελληνικά 日本語",
    "C:\\dir\\x_y-z {a: [1, 2]} <b>&amp;</b> # @ ~ ^ | `código`",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def small(request, sample_texts):
    return SpanishSPMTokenizer.train(sample_texts[:10], 700, request.param)


@pytest.mark.parametrize("text", EXACT)
def test_round_trip_is_exact(text, small):
    tokenizer = small
    ids = tokenizer.encode(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_id not in ids


def test_special_ids(tokenizer):
    assert [tokenizer.id_to_piece(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )


def test_digits_are_split(tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in tokenizer.encode_ids(["20261123"])[0]]
    assert [p.strip("▁") for p in pieces if p != "▁"] == list("20261123")


def test_training_does_not_depend_on_the_order_of_texts(sample_texts, tokenizer):
    shuffled = sample_texts.copy()
    random.Random(3).shuffle(shuffled)
    assert SpanishSPMTokenizer.train(shuffled, 1200).model == tokenizer.model


def test_counts_of_words_matter():
    """A word seen often becomes one piece, whatever the number of different words."""
    rare = [f"{a}{b}{c}ma" for a in "bcdfgl" for b in "aeiou" for c in "lmnrs"]
    trained = SpanishSPMTokenizer.train([" ".join(rare), "murciélago " * 500, "\ud800"], 320, "bpe")
    assert len(trained.encode_ids(["murciélago"])[0]) == 1


def test_vocabulary_is_reduced_and_said_once(sample_texts, caplog):
    with caplog.at_level(logging.WARNING):
        trained = SpanishSPMTokenizer.train(sample_texts[:3], 50_000)
    assert 300 < trained.vocab_size < 50_000
    assert len(caplog.records) == 1
    assert "50000" in caplog.text
    assert str(trained.vocab_size) in caplog.text


def test_impossible_vocabulary(sample_texts):
    with pytest.raises(ConfigError, match=r"vocab_size=50 .*at least"):
        SpanishSPMTokenizer.train(sample_texts[:3], 50)
    with pytest.raises(ConfigError, match="model_type='wordpiece'"):
        SpanishSPMTokenizer.train(sample_texts[:3], 500, "wordpiece")
    with pytest.raises(DataError, match="no words"):
        SpanishSPMTokenizer.train(["", "  \n"], 500)


def test_word_counter_stays_bounded():
    from tbf.data.tokenizer_training import WordCounter

    counter = WordCounter(max_words=1000)
    for i in range(5000):
        counter.add(f"casa perro único{i}")
        assert len(counter.counts) <= 1000
    assert counter.counts["casa"] == counter.counts["perro"] == 5000
    assert counter.lines()[0] == "casa\t5000"


def test_literal_special_tokens_stay_text_in_the_shard_path(tokenizer):
    ids = tokenizer.encode_ids(["[CLS] hola [MASK] [SEP] [PAD]"])[0]
    assert min(ids) > tokenizer.mask_id
    assert tokenizer.decode(ids) == "[CLS] hola [MASK] [SEP] [PAD]"


@pytest.mark.parametrize(
    "text", ["La capital es [MASK].", "[MASK] hola", "hola [MASK]", "uno [MASK] [MASK], dos", "([MASK])", "[MASK]"]
)
def test_mask_in_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.mask_id) == text.count("[MASK]")
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == text.replace(" ", "")


def test_neighbours_of_a_mask_are_tokenised_as_beside_a_word(tokenizer):
    masked = tokenizer.encode("La casa es [MASK].")["input_ids"]
    plain = tokenizer.encode("La casa es blanca.")["input_ids"]
    at = masked.index(tokenizer.mask_id)
    assert masked[:at] == plain[:at]
    assert masked[at + 1 :] == plain[-2:]  # "." without a space before it, [SEP]


def test_encode_shapes(tokenizer):
    single = tokenizer.encode("Hola, mundo")
    assert single["input_ids"][0] == tokenizer.cls_id
    assert single["input_ids"][-1] == tokenizer.sep_id
    batch = tokenizer.encode(["Hola", "Una frase bastante más larga que la otra"], return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].dtype == torch.int64
    width = int(batch["attention_mask"][0].sum())
    assert (batch["input_ids"][0, width:] == tokenizer.pad_id).all()
    assert batch["attention_mask"][1].all()
    assert tokenizer.encode("Hola", return_tensors="pt")["input_ids"].ndim == 2
    assert tokenizer.decode(batch["input_ids"]) == ["Hola", "Una frase bastante más larga que la otra"]


def test_truncation_and_padding(tokenizer):
    text = "palabra " * 50
    cut = tokenizer.encode(text, max_length=16)["input_ids"]
    assert len(cut) == 16
    assert cut[-1] == tokenizer.sep_id
    padded = tokenizer.encode("Hola", max_length=16, padding="max_length")
    assert len(padded["input_ids"]) == len(padded["attention_mask"]) == 16
    assert tokenizer.encode(["Hola", text], padding=False)["input_ids"][0] == tokenizer.encode("Hola")["input_ids"]
    with pytest.raises(DataError, match="truncation=True"):
        tokenizer.encode(text, max_length=16, truncation=False)
    with pytest.raises(ConfigError, match="padding=True"):
        tokenizer.encode(["Hola", text], padding=False, return_tensors="pt")
    with pytest.raises(ConfigError, match="max_length"):
        tokenizer.encode(text, max_length=2)
    with pytest.raises(ConfigError, match="return_tensors"):
        tokenizer.encode(text, return_tensors="tf")


def test_save_and_load(tokenizer, tmp_path):
    folder = tokenizer.save_pretrained(tmp_path / "tok")
    for path in (folder, folder / "tokenizer.model", str(folder)):
        loaded = SpanishSPMTokenizer.from_pretrained(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("¡Hola!") == tokenizer.encode("¡Hola!")
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint


def test_bad_tokenizer_files(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no tokenizer there"):
        SpanishSPMTokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(DataError, match="no tokenizer there"):
        SpanishSPMTokenizer.from_pretrained(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
        SpanishSPMTokenizer.from_pretrained(tmp_path / "bad.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(DataError, match="empty"):
        SpanishSPMTokenizer.from_pretrained(tmp_path / "empty.model")
    (tmp_path / "cut.model").write_bytes(tokenizer.model[: len(tokenizer.model) // 2])
    with pytest.raises(DataError):
        SpanishSPMTokenizer.from_pretrained(tmp_path / "cut.model")
    folder = tokenizer.save_pretrained(tmp_path / "tok")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "sha256": "0" * 64}))
    with pytest.raises(DataError, match="different tokenizers"):
        SpanishSPMTokenizer.from_pretrained(folder)
    with pytest.raises(DataError, match="outside"):
        tokenizer.decode([5, tokenizer.vocab_size])


def test_foreign_sentencepiece_model_is_refused(tmp_path, sample_texts):
    import sentencepiece

    (tmp_path / "t.txt").write_text("\n".join(sample_texts[:5]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "foreign"), vocab_size=400, minloglevel=2
    )
    with pytest.raises(DataError, match="ids 0-4 must be"):
        SpanishSPMTokenizer.from_pretrained(tmp_path / "foreign.model")
