"""Masks and convolutions inside documents."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tbf.errors import ConfigError
from tbf.ops.segments import same_segment, segment_conv
from tests.ops.reference import random_segments, segments


def test_same_segment():
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(same_segment(torch.tensor([[1, 1, 2]])), expected[None, None])


def per_document(x, weight, seg):
    """An ordinary zero-padded convolution of each document by itself."""
    taps, y = weight.shape[1], torch.zeros_like(x)
    for row in range(len(x)):
        for document in seg[row].unique():
            inside = seg[row] == document
            piece = F.conv1d(x[row, inside].T[None], weight[:, None], padding=taps // 2, groups=len(weight))
            y[row, inside] = piece[0].T
    return y


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    taps=st.sampled_from([1, 3, 5, 7]),
    seed=st.integers(0, 2**20),
)
def test_conv_equals_one_convolution_per_document(lengths, taps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, sum(lengths), 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, taps, dtype=torch.float64, generator=generator)
    seg = segments(*lengths)
    torch.testing.assert_close(segment_conv(x, weight, seg), per_document(x, weight, seg))


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_conv_gradients(tokens):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    seg = random_segments(2, tokens, 3)
    assert torch.autograd.gradcheck(lambda x, w: segment_conv(x, w, seg), (x, weight))


def test_conv_keeps_only_its_inputs():
    x, weight = torch.randn(1, 64, 8, requires_grad=True), torch.randn(8, 7, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        segment_conv(x, weight, segments(64))
    assert sum(saved) == x.numel() + weight.numel() + 64


def test_conv_refuses_an_even_width():
    with pytest.raises(ConfigError, match=r"4 taps.*e\.g\. 5"):
        segment_conv(torch.zeros(1, 2, 3), torch.zeros(3, 4), segments(2))
