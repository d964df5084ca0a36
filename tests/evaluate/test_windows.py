from __future__ import annotations

import numpy as np
import pytest

from tbf.errors import ConfigError
from tbf.evaluate.windows import cut
from tests.evaluate.test_fill_mask import Pair
from tests.export.tiny_runs import TEXT


@pytest.mark.parametrize(("length", "stride"), [(4, 1), (7, 0), (12, 3), (12, 10), (16, 5), (500, 0)])
def test_every_token_is_scored_once_in_order(pair: Pair, length: int, stride: int) -> None:
    tokenizer = pair[1]
    for text in (*TEXT, "Sí.", " ".join(TEXT)):
        (ids,) = tokenizer.encode_ids([text])
        windows = list(cut(tokenizer, [text], length, stride))
        assert np.concatenate([window.ids[window.first : window.end] for window in windows]).tolist() == ids
        assert all(len(window.ids) <= length for window in windows)
        assert all(window.ids[0] == tokenizer.cls_id and window.ids[-1] == tokenizer.sep_id for window in windows)


def test_overlaps_are_shared_so_that_tokens_see_both_sides(pair: Pair) -> None:
    windows = list(cut(pair[1], [" ".join(TEXT * 3)], 18, 8))  # 16 tokens of which 8 overlap
    assert len(windows) > 4
    for window in windows[1:-1]:
        assert (window.first - 1, len(window.ids) - 1 - window.end) == (4, 4)


def test_a_text_of_a_megabyte_is_windowed(pair: Pair) -> None:
    text = " ".join(TEXT) * (1_000_000 // len(" ".join(TEXT)) + 1)
    windows = list(cut(pair[1], [text], 512))
    assert len(windows) > 500
    assert sum(window.end - window.first for window in windows) == len(pair[1].encode_ids([text])[0])


def test_texts_without_tokens_give_no_window(pair: Pair) -> None:
    assert list(cut(pair[1], ["", " \n"], 16)) == []


@pytest.mark.parametrize(("length", "stride"), [(3, 0), (10, 9), (10, -1)])
def test_refusals(pair: Pair, length: int, stride: int) -> None:
    with pytest.raises(ConfigError):
        list(cut(pair[1], TEXT, length, stride))
