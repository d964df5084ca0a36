from __future__ import annotations

import pytest

from tbf.data.plan import PrepareOptions
from tbf.data.prepare import prepare_folder
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.data.tokenizer_tools import PROBES, evaluate_tokenizers, format_scores, sample_texts, train_tokenizer
from tbf.errors import DataError

from .conftest import write_jsonl


def test_train_is_deterministic_and_saves(tmp_path, tokenizer):
    trained = train_tokenizer("sample", tmp_path / "a", vocab_size=1200)
    assert trained.fingerprint == tokenizer.fingerprint
    assert SpanishSPMTokenizer.from_pretrained(tmp_path / "a").fingerprint == trained.fingerprint


def test_sample_is_bounded_and_spread_over_the_source(tmp_path, texts):
    for number in range(5):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"fichero{number} {t}" for t in texts[:50]])
    options = PrepareOptions(shard_bytes=20_000)
    total = sum(len(t.encode()) for t in sample_texts([(str(tmp_path), None)], options, 10**9))
    part = list(sample_texts([(str(tmp_path), None)], options, total // 4))
    size = sum(len(t.encode()) for t in part)
    assert size < 0.3 * total
    assert len({t.split()[0] for t in part}) >= 4


def test_scores(tmp_path, tokenizer, sample_texts):
    tokenizer.save_pretrained(tmp_path / "own")
    SpanishSPMTokenizer.train(sample_texts, 2500).save_pretrained(tmp_path / "large")
    small, large, file = evaluate_tokenizers(
        [tmp_path / "own", tmp_path / "large", tmp_path / "own" / "tokenizer.model"], "sample"
    )
    assert (small.vocab_size, large.vocab_size) == (1200, 2500)
    assert small.words == large.words > 35_000
    assert 1.0 < large.fertility < small.fertility < 4.0
    assert large.bytes_per_token > small.bytes_per_token > 2.0
    assert small.unknown_rate == 0.0
    assert 0.0 < small.byte_rate < 0.05
    assert small.round_trips == dict.fromkeys(PROBES, True)
    assert abs(small.fertility / file.fertility - 1) < 1e-3
    table = format_scores([small, large])
    assert "tokens/word" in table
    assert table.count("all") == 2


def test_other_kinds_of_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "de": 1, "la": 2}, unk_token="[UNK]"))
    other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    other.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        (score,) = evaluate_tokenizers([path], "sample")
        assert score.unknown_rate > 0.8
        assert not any(score.round_trips.values())
        assert "not numbers" in format_scores([score])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        evaluate_tokenizers([tmp_path / "bad.json"], "sample")
    with pytest.raises(DataError, match="no SentencePiece model"):
        evaluate_tokenizers([tmp_path / "missing.model"], "sample")
    with pytest.raises(DataError, match="no tokenizer there"):
        evaluate_tokenizers([tmp_path / "missing"], "sample")


def test_prepare_folder_trains_when_no_tokenizer_is_given(tmp_path):
    options = PrepareOptions(progress=False)
    first = prepare_folder("sample", tmp_path / "p", vocab_size=900, options=options)
    model = (tmp_path / "p" / "tokenizer" / "tokenizer.model").read_bytes()
    assert SpanishSPMTokenizer(model).vocab_size == 900
    again = prepare_folder("sample", tmp_path / "p", vocab_size=500, options=options)  # the one that is there is taken
    assert (again.made, again.tokens) == (0, first.tokens)


@pytest.mark.parametrize("remembered", [10**6, 0, 500])
def test_same_ids_alone_and_in_batches(tokenizer, sample_texts, monkeypatch, remembered):
    monkeypatch.setattr("tbf.data.words.REMEMBERED", remembered)
    tokenizer = SpanishSPMTokenizer(tokenizer.model)
    for batch in ([], ["", " "], sample_texts[:2], sample_texts[:3]):  # remembered words must change nothing
        ids, ends = tokenizer.encode_batch(batch)
        assert ids.tolist() == [i for one in tokenizer.encode_ids(batch) for i in one] and len(ends) == len(batch)
    texts = [*sample_texts, "", "uno", "dos\u00a0tres\u2003cuatro\n", "´acento suelto ½ ﬁn", "x" * 5000]
    ids, ends = tokenizer.encode_batch(texts)
    start = 0
    for text, end, one in zip(texts, ends.tolist(), tokenizer.encode_ids(texts)):
        assert ids[start:end].tolist() == one == tokenizer.encode(text, add_special_tokens=False)["input_ids"]
        start = end
    assert start == len(ids)


def test_white_space_is_the_same_for_single_texts_and_batches():
    """Texts are split by Python alone and by Arrow in batches: both must agree on every character."""
    import pyarrow as pa
    import pyarrow.compute as pc

    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [f"a{c}b" for c in characters]
    counts = pc.list_value_length(pc.utf8_split_whitespace(pa.array(texts))).to_pylist()
    assert counts == [len(t.split()) for t in texts]
