from __future__ import annotations

import numpy as np
import pytest
import torch

from tbf.errors import ConfigError, DataError
from tbf.evaluate.embeddings import embed
from tests.evaluate.test_fill_mask import Pair
from tests.export.tiny_runs import TEXT

TEXTS = [*TEXT, "", "Sí.", "El gato de la casa de la calle de España ladra y duerme. " * 3]


def test_rows_do_not_depend_on_batches_or_order(pair: Pair) -> None:
    model, tokenizer = pair
    vectors = embed(model, tokenizer, TEXTS, batch_size=4)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), model.config.hidden_size)
    for text, vector in zip(TEXTS, vectors):
        with torch.no_grad():
            alone = model(**tokenizer.encode(text, return_tensors="pt")).pooler_output[0]
        np.testing.assert_allclose(vector, alone.numpy(), atol=2e-5)
    np.testing.assert_allclose(embed(model, tokenizer, TEXTS[::-1], batch_size=2)[::-1], vectors, atol=2e-5)


def test_normalize(pair: Pair) -> None:
    plain, unit = embed(*pair, TEXT), embed(*pair, TEXT, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(plain / np.linalg.norm(plain, axis=1, keepdims=True), unit, atol=1e-6)


def test_long_texts_are_cut_with_a_notice(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = pair
    caplog.set_level("WARNING")
    vectors = embed(model, tokenizer, ["hola", "hola mundo " * 500], max_length=16)
    assert "1 of 2 texts were cut to 16 tokens, the first is text 2" in caplog.text
    rows = tokenizer.encode("hola mundo " * 500, max_length=16, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(vectors[1], model(**rows).pooler_output[0].numpy(), atol=2e-5)


def test_refusals(pair: Pair) -> None:
    with pytest.raises(DataError, match="no text"):
        embed(*pair, [])
    with pytest.raises(ConfigError, match="batch_size 0"):
        embed(*pair, TEXT, batch_size=0)
