from __future__ import annotations

import pytest
import torch

from tbf.data.tokenizer import SPECIAL_TOKENS, SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError
from tbf.evaluate.fill_mask import fill_mask
from tbf.model.encoder import TormentedBertFrankenstein

Pair = tuple[TormentedBertFrankenstein, SpanishSPMTokenizer]


def test_candidates_are_the_models_most_probable_tokens(pair: Pair) -> None:
    model, tokenizer = pair
    text = "El perro [MASK] en la calle."
    ids = tokenizer.encode(text, return_tensors="pt")["input_ids"]
    labels = torch.where(ids == tokenizer.mask_id, 7, -100)
    with torch.no_grad():
        logits = model(ids, labels=labels).logits[0, 0]
    logits[: len(SPECIAL_TOKENS)] = -torch.inf
    (candidates,) = fill_mask(model, tokenizer, text, top_k=4)
    assert [c.token_id for c in candidates] == logits.topk(4).indices.tolist()
    expected = logits.softmax(-1).topk(4).values
    torch.testing.assert_close(torch.tensor([c.probability for c in candidates]), expected)


def test_every_mask_gets_its_candidates_and_the_others_stay(pair: Pair) -> None:
    masks = fill_mask(*pair, "El [MASK] ladra y el [MASK] duerme.", top_k=2)
    assert [len(candidates) for candidates in masks] == [2, 2]
    for index, candidates in enumerate(masks):
        for candidate in candidates:
            before, after = candidate.text.split("[MASK]")
            assert candidate.token in (before if index == 0 else after)
            assert "duerme" in after
            assert "[CLS]" not in candidate.text


def test_top_k_beyond_the_vocabulary(pair: Pair) -> None:
    (candidates,) = fill_mask(*pair, "[MASK]", top_k=10**6)
    assert len(candidates) == pair[1].vocab_size - len(SPECIAL_TOKENS)
    assert sum(c.probability for c in candidates) == pytest.approx(1.0, abs=1e-4)


def test_refusals(pair: Pair) -> None:
    with pytest.raises(DataError, match=r"has no \[MASK\]"):
        fill_mask(*pair, "Hola <mask>")
    with pytest.raises(DataError, match=r"\.\.\."):
        fill_mask(*pair, "hola " * 100)
    with pytest.raises(DataError, match="more than 8192"):
        fill_mask(*pair, "x9 " * 9000 + "[MASK]")
    with pytest.raises(ConfigError, match="top_k is 0"):
        fill_mask(*pair, "[MASK]", top_k=0)
