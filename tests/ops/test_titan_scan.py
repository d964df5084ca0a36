"""The chunked memory against a token loop that takes its surprise from autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tbf.errors import ConfigError
from tbf.ops.titan_scan import titan_scan
from tests.ops.reference import random_segments, segments, titan_loop


def inputs(tokens, *, batch=1, heads=2, width=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, tokens, width, dtype=dtype, generator=generator)
    gates = 0.5 * torch.rand(3, batch, heads, tokens, dtype=dtype, generator=generator)
    initial = torch.randn(heads, width, width, dtype=dtype, generator=generator)
    return q, F.normalize(k, dim=-1), v, *gates, initial


def scan(q, k, v, theta, eta, alpha, initial, seg, **kwargs):
    return titan_scan(q, k, v, theta, eta, alpha, seg, initial, **kwargs)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    chunk=st.sampled_from([1, 2, 5, 8, 64]),
    reverse=st.booleans(),
)
def test_equals_the_token_loop(lengths, chunk, reverse):
    *streams, initial = inputs(sum(lengths))
    seg = segments(*lengths)
    got = scan(*streams, initial, seg, chunk_size=chunk, reverse=reverse)
    if reverse:
        streams, seg = [t.flip(2) for t in streams], seg.flip(1)
    expected = titan_loop(*streams, seg, initial, chunk)
    torch.testing.assert_close(got.flip(2) if reverse else got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients(reverse):
    tensors = [t.requires_grad_() for t in inputs(9, heads=1, width=2)]
    seg = segments(2, 6, 1)
    assert torch.autograd.gradcheck(lambda *t: scan(*t, seg, chunk_size=4, reverse=reverse), tensors)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_document_learns_as_if_alone(reverse):
    *streams, initial = inputs(60)
    packed = scan(*streams, initial, segments(11, 30, 19), chunk_size=8, reverse=reverse)
    alone = scan(*(t[:, :, 11:41] for t in streams), initial, segments(30), chunk_size=8, reverse=reverse)
    torch.testing.assert_close(packed[:, :, 11:41], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_documents_are_bitwise_apart(reverse):
    *streams, initial = (t.requires_grad_() for t in inputs(60, dtype=torch.float32))
    seg = segments(11, 30, 19)
    target = seg[0] == 2
    y = scan(*streams, initial, seg, chunk_size=8, reverse=reverse)
    y[:, :, target].pow(3).sum().backward()
    for t in streams:
        assert torch.all(t.grad[:, :, ~target] == 0)
        assert torch.any(t.grad[:, :, target] != 0)


def test_equal_keys_stay_stable():
    """The worst case, at the largest step that the documented bound allows."""
    tokens, chunk, eta = 1024, 64, 0.95
    key = F.normalize(torch.ones(8), dim=0).expand(1, 1, tokens, 8)
    v = torch.randn(1, 1, tokens, 8, generator=torch.Generator().manual_seed(0))
    gate = torch.ones(1, 1, tokens)
    y = scan(key, key, v, gate * (1 - eta) / chunk, gate * eta, gate * 0, torch.zeros(1, 8, 8), segments(tokens))
    assert y.abs().max() < 5


@pytest.mark.parametrize(("eta", "alpha"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_saturated_gates_are_exact_and_have_finite_gradients(eta, alpha):
    q, k, v, theta, _, _, initial = inputs(40)
    gates = [torch.full_like(theta, value).requires_grad_() for value in (eta, alpha)]
    seg = random_segments(1, 40, 3)
    y = scan(q, k, v, 0.01 * theta, *gates, initial, seg, chunk_size=8)
    expected = titan_loop(q, k, v, 0.01 * theta, *(g.detach() for g in gates), seg, initial, 8)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(torch.isfinite(g.grad).all() for g in gates)


def test_refuses_an_empty_chunk():
    with pytest.raises(ConfigError, match="titan_chunk_size is 0"):
        scan(*inputs(3), segments(3), chunk_size=0)
