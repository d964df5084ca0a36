from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tbf.data.masking import EMPTY
from tbf.errors import ConfigError, DataError
from tbf.evaluate.mlm import CLASSES, WordClasses, masked_lm, pseudo_likelihood
from tbf.evaluate.windows import Window, cut
from tests.evaluate.test_fill_mask import Pair
from tests.export.tiny_runs import TEXT


@pytest.fixture(scope="module")
def windows(pair: Pair) -> list[Window]:
    return list(cut(pair[1], [*TEXT, "En 1492 hubo 3 naves."], 14, 6))


def nll_of_a_hidden_token(pair: Pair, window: Window, place: int) -> float:
    """From the dense logits of the row alone."""
    model, tokenizer = pair
    ids = torch.from_numpy(window.ids)[None].clone()
    wanted = ids[0, place].item()
    ids[0, place] = tokenizer.mask_id
    with torch.no_grad():
        logits = model.predict(model(ids).last_hidden_state[0, place])
    return float(-logits.log_softmax(-1)[wanted])


def test_pseudo_perplexity_is_that_of_tokens_hidden_one_by_one(pair: Pair, windows: list[Window]) -> None:
    each = [nll_of_a_hidden_token(pair, w, place) for w in windows for place in range(w.first, w.end)]
    found = pseudo_likelihood(*pair, windows, tokens=10**6, batch_size=5)
    assert found["pseudo_tokens"] == len(each)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(np.mean(each)), rel=1e-4)
    assert found["pseudo_perplexity_error"] == 0.0


def test_a_sample_of_tokens_estimates_it(pair: Pair, windows: list[Window]) -> None:
    whole = pseudo_likelihood(*pair, windows, tokens=10**6)["pseudo_perplexity"]
    found = pseudo_likelihood(*pair, windows, tokens=25, seed=3)
    assert found["pseudo_tokens"] == 25
    assert abs(found["pseudo_perplexity"] - whole) < 5 * found["pseudo_perplexity_error"]
    again = pseudo_likelihood(*pair, windows, tokens=25, seed=3, batch_size=4)
    assert found["pseudo_perplexity"] == pytest.approx(again["pseudo_perplexity"])


def test_masked_loss_does_not_depend_on_batches_and_hides_the_asked_share(pair: Pair, windows: list[Window]) -> None:
    alone, together = (masked_lm(*pair, windows, rate=0.3, batch_size=size) for size in (1, 64))
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert alone["masked_tokens"] == together["masked_tokens"]
    scored = sum(w.end - w.first for w in windows)
    assert 0.2 * scored < alone["masked_tokens"] < 0.45 * scored
    parts = alone["by_class"]
    assert sum(part["masked_tokens"] for part in parts.values()) == alone["masked_tokens"]
    mean = sum(part["loss"] * part["masked_tokens"] for part in parts.values()) / alone["masked_tokens"]
    assert mean == pytest.approx(alone["loss"])


def test_masked_loss_is_the_models_loss_of_the_hidden_tokens(
    pair: Pair, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is shown: only [MASK], only at scored places, and the labels are what stood there."""
    model, seen = pair[0], []
    forward = model.forward

    def spy(ids, **given):
        out = forward(ids, **given)
        seen.append((ids, given, out))
        return out

    monkeypatch.setattr(model, "forward", spy)
    found = masked_lm(*pair, windows, batch_size=1)
    by_length = sorted(range(len(windows)), key=lambda i: len(windows[i].ids), reverse=True)
    total = 0.0
    for number, (ids, given, out) in zip(by_length, seen):
        window, filled = windows[number], given["masked_labels"][0] != EMPTY
        places, labels = given["masked_positions"][0][filled].numpy(), given["masked_labels"][0][filled].numpy()
        assert ((places >= window.first) & (places < window.end)).all()
        assert (labels == window.ids[places]).all()
        assert (ids[0].numpy()[places] == pair[1].mask_id).all()
        assert np.array_equal(np.delete(ids[0].numpy(), places), np.delete(window.ids, places))
        total += out.mlm_loss.item() * len(places)
    assert found["loss"] == pytest.approx(total / found["masked_tokens"], rel=1e-5)


def test_word_classes(pair: Pair) -> None:
    tokenizer = pair[1]
    (ids,) = tokenizer.encode_ids(["El perro, en 1492: casa."])
    words = {"El": 0, "perro": 1, ",": 3, "en": 0, "1492": 2, ":": 3, "casa": 1, ".": 3}
    kinds = WordClasses(tokenizer).of(np.array([tokenizer.cls_id, *ids, tokenizer.sep_id]))
    spelled = "".join(tokenizer.id_to_piece(i).replace("\u2581", "") for i in ids)
    assert kinds[0] == kinds[-1] == CLASSES.index("punctuation")
    given = []
    for i, kind in zip(ids, kinds[1:-1]):
        piece = tokenizer.id_to_piece(i)
        if not piece.startswith("<0x"):
            given += [int(kind)] * len(piece.replace("\u2581", ""))
    if "<0x" not in spelled:
        assert given == [kind for word, kind in words.items() for _ in word]


def test_refusals(pair: Pair, windows: list[Window]) -> None:
    with pytest.raises(DataError, match="no token to score"):
        masked_lm(*pair, [])
    with pytest.raises(DataError, match="no token to score"):
        pseudo_likelihood(*pair, [], tokens=5)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        masked_lm(*pair, windows, batch_size=0)
    with pytest.raises(ConfigError, match="rate"):
        masked_lm(*pair, windows, rate=1.5)
