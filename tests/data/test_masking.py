from __future__ import annotations

import numpy as np
import pytest

from tbf.data.masking import EMPTY, MaskSpec, mask_rows
from tbf.errors import ConfigError

VOCAB = 1000


def make_rows(rows=16, width=128, seed=0):
    """Rows of several documents with [CLS] 2 and [SEP] 3 and some padding."""
    generator = np.random.default_rng(seed)
    ids = np.zeros((rows, width), np.int64)
    segments = np.zeros((rows, width), np.int64)
    for row in range(rows):
        at, segment = 0, 0
        end = width - int(generator.integers(0, 20))
        while end - at >= 3:
            size = min(int(generator.integers(3, 40)), end - at)
            segment += 1
            ids[row, at : at + size] = [2, *generator.integers(5, VOCAB, size - 2), 3]
            segments[row, at : at + size] = segment
            at += size
    return ids, segments


def mask(spec, ids, segments, epochs=0, rows=None, **options):
    rows = np.arange(len(ids)) if rows is None else rows
    return mask_rows(ids, segments, np.broadcast_to(epochs, len(ids)), rows, spec, **options)


def test_fixed_count_of_ordinary_tokens_only():
    ids, segments = make_rows()
    inputs, positions, labels = mask(MaskSpec(0.3, VOCAB), ids, segments)
    candidates = ((segments > 0) & (ids >= 5)).sum(1)
    filled = labels != EMPTY
    assert positions.shape == labels.shape == (16, round(0.3 * 128))
    assert np.array_equal(filled.sum(1), np.rint(0.3 * candidates))
    taken = np.take_along_axis(ids, positions, 1)
    assert np.array_equal(labels[filled], taken[filled])
    assert labels[filled].min() >= 5
    for row in range(len(ids)):
        chosen = positions[row, filled[row]]
        assert len(set(chosen.tolist())) == len(chosen)
        assert (np.diff(chosen) > 0).all()
        untouched = np.setdiff1d(np.arange(128), chosen)
        assert np.array_equal(inputs[row, untouched], ids[row, untouched])


def test_shares_of_mask_random_and_kept():
    ids, segments = make_rows(rows=400)
    inputs, positions, labels = mask(MaskSpec(0.3, VOCAB, mask_share=0.8, random_share=0.1), ids, segments)
    filled = labels != EMPTY
    shown = np.take_along_axis(inputs, positions, 1)[filled]
    truth = labels[filled]
    assert abs((shown == 4).mean() - 0.8) < 0.01
    assert abs((shown == truth).mean() - 0.1) < 0.01
    other = shown[(shown != 4) & (shown != truth)]
    assert abs(len(other) / len(shown) - 0.1) < 0.01
    assert other.min() >= 5
    assert other.max() < VOCAB
    assert len(np.unique(other)) > 0.6 * VOCAB


def test_all_mask():
    ids, segments = make_rows()
    inputs, positions, labels = mask(MaskSpec(0.15, VOCAB, mask_share=1.0, random_share=0.0), ids, segments)
    assert (np.take_along_axis(inputs, positions, 1)[labels != EMPTY] == 4).all()


def test_same_row_same_mask_in_any_batch():
    ids, segments = make_rows()
    spec = MaskSpec(0.3, VOCAB, seed=5)
    together = mask(spec, ids, segments)
    for row in (0, 7, 15):
        alone = mask(spec, ids[row : row + 1], segments[row : row + 1], rows=np.array([row]))
        for a, b in zip(alone, together):
            assert np.array_equal(a[0], b[row])


def test_other_epoch_seed_or_row_gives_another_mask():
    ids, segments = make_rows()
    base = mask(MaskSpec(0.3, VOCAB, seed=5), ids, segments)[1]
    assert (mask(MaskSpec(0.3, VOCAB, seed=5), ids, segments, epochs=1)[1] != base).mean() > 0.5
    assert (mask(MaskSpec(0.3, VOCAB, seed=6), ids, segments)[1] != base).mean() > 0.5
    assert (mask(MaskSpec(0.3, VOCAB, seed=5), ids, segments, rows=np.arange(16) + 1)[1] != base).mean() > 0.5


def test_every_position_is_equally_likely():
    ids = np.full((4000, 40), 50, np.int64)
    counts = np.bincount(mask(MaskSpec(0.3, VOCAB), ids, np.ones_like(ids))[1].ravel(), minlength=40)
    expected = 4000 * 0.3
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.7)


def test_rows_with_little_text():
    ids, segments = np.zeros((2, 32), np.int64), np.zeros((2, 32), np.int64)
    ids[0, :3], segments[0, :3] = [2, 77, 3], 1
    inputs, positions, labels = mask(MaskSpec(0.3, VOCAB), ids, segments)
    assert (labels[0] != EMPTY).sum() == 1
    assert positions[0, 0] == 1
    assert labels[0, 0] == 77
    assert (labels[1] == EMPTY).all()
    assert not inputs[1].any()


def test_whole_words():
    ids, segments = make_rows(rows=50)
    starts = np.zeros(VOCAB, bool)
    starts[: VOCAB // 2] = True  # half of the tokens begin a word
    _, positions, labels = mask(MaskSpec(0.3, VOCAB, word_starts=starts), ids, segments)
    plain = (mask(MaskSpec(0.3, VOCAB), ids, segments)[2] != EMPTY).sum()
    hidden = np.zeros(ids.shape, bool)
    for row in range(len(ids)):
        hidden[row, positions[row, labels[row] != EMPTY]] = True
    candidates = (segments > 0) & (ids >= 5)
    continues = candidates[:, 1:] & candidates[:, :-1] & ~starts[ids[:, 1:]]
    assert continues.any()
    assert np.array_equal(hidden[:, 1:][continues], hidden[:, :-1][continues])
    assert 0.97 * plain <= hidden.sum() <= plain


def test_rate_schedule():
    spec = MaskSpec(0.3, VOCAB, end_rate=0.15, start_row=1000, end_row=2000)
    assert spec.rate_at(0) == spec.rate_at(1000) == 0.3
    assert spec.rate_at(2000) == spec.rate_at(10**9) == 0.15
    rates = [spec.rate_at(p) for p in range(1000, 2001)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) <= 17
    ids, segments = make_rows()
    early = mask(spec, ids, segments, position=0)
    late = mask(spec, ids, segments, position=5000)
    assert late[1].shape[1] == round(0.15 * 128)
    for row in range(16):  # a lower rate hides a part of the same positions
        some = set(late[1][row, late[2][row] != EMPTY].tolist())
        assert some < set(early[1][row, early[2][row] != EMPTY].tolist())


@pytest.mark.parametrize(
    "wrong",
    [{"rate": 0.0}, {"rate": 1.0}, {"rate": 0.3, "mask_share": 0.9, "random_share": 0.2}, {"rate": 0.3, "end_rate": 2}],
)
def test_wrong_shares(wrong):
    with pytest.raises(ConfigError):
        MaskSpec(vocab_size=VOCAB, **wrong)
