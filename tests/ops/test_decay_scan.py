"""Decay scans against the token recurrence and the explicit matrix, in FP64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbf.ops.decay_scan import decay_scan, retention_scan
from tests.ops.reference import decay_recurrence, random_segments, retention_matrix, segments

DIRECTIONS = [(reverse, inclusive) for reverse in (False, True) for inclusive in (False, True)]
ON_EDGES = segments(16, 32, 64, 16)  # documents that start and end on chunk edges
OFF_EDGES = segments(5, 1, 1, 43, 40, 38)


def inputs(tokens, *, batch=1, heads=2, key=6, value=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, tokens, heads, key, dtype=dtype, generator=generator) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value, dtype=dtype, generator=generator)
    return q, k, v, -torch.rand(batch, tokens, heads, dtype=dtype, generator=generator)


@pytest.mark.parametrize(("reverse", "inclusive"), DIRECTIONS)
@pytest.mark.parametrize("seg", [ON_EDGES, OFF_EDGES], ids=["on_edges", "off_edges"])
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 128])
def test_equals_the_recurrence(reverse, inclusive, seg, chunk_size):
    q, k, v, g = inputs(128)
    got = decay_scan(q, k, v, g, seg, chunk_size=chunk_size, reverse=reverse, inclusive=inclusive)
    expected = decay_recurrence(q, k, v, g, seg, reverse=reverse, inclusive=inclusive)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    chunk_size=st.integers(1, 20),
    reverse=st.booleans(),
    inclusive=st.booleans(),
)
def test_any_documents_and_chunks(lengths, chunk_size, reverse, inclusive):
    q, k, v, g = inputs(sum(lengths), key=2, value=3)
    seg = segments(*lengths)
    got = decay_scan(q, k, v, g, seg, chunk_size=chunk_size, reverse=reverse, inclusive=inclusive)
    expected = decay_recurrence(q, k, v, g, seg, reverse=reverse, inclusive=inclusive)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seg", [ON_EDGES, OFF_EDGES], ids=["on_edges", "off_edges"])
@pytest.mark.parametrize("chunk_size", [1, 16, 64, 128])
def test_retention_equals_the_explicit_matrix(seg, chunk_size):
    q, k, v, _ = inputs(128)
    log_gamma = torch.tensor([-0.03, -0.4], dtype=torch.float64)
    got = retention_scan(q, k, v, log_gamma, seg, chunk_size=chunk_size)
    torch.testing.assert_close(got, retention_matrix(q, k, v, log_gamma, seg), rtol=1e-11, atol=1e-11)


def test_retention_is_one_scan_per_direction():
    q, k, v, _ = inputs(100)
    log_gamma = torch.tensor([-0.03, -0.4], dtype=torch.float64)
    seg, g = random_segments(1, 100, 4), log_gamma.expand(1, 100, 2)
    both = decay_scan(q, k, v, g, seg) + decay_scan(q, k, v, g, seg, reverse=True, inclusive=False)
    torch.testing.assert_close(retention_scan(q, k, v, log_gamma, seg), both, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("reverse", "inclusive"), DIRECTIONS)
@pytest.mark.parametrize("chunk_size", [3, 16])
def test_gradients(reverse, inclusive, chunk_size):
    tensors = [t.requires_grad_() for t in inputs(11, heads=1, key=2, value=2)]
    seg = segments(4, 3, 4)
    assert torch.autograd.gradcheck(
        lambda *t: decay_scan(*t, seg, chunk_size=chunk_size, reverse=reverse, inclusive=inclusive), tensors
    )


@pytest.mark.parametrize("chunk_size", [3, 16])
def test_retention_gradients(chunk_size):
    q, k, v, _ = (t.requires_grad_() for t in inputs(11, heads=1, key=2, value=2))
    log_gamma = torch.tensor([-0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: retention_scan(*t, log_gamma, segments(4, 3, 4), chunk_size=chunk_size), (q, k, v)
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_one_head_of_keys_serves_all_heads_of_values(reverse):
    q, k, v, g = inputs(150)
    q, k, seg = q[:, :, :1], k[:, :, :1], random_segments(1, 150, 3)
    got = decay_scan(q, k, v, g, seg, chunk_size=16, reverse=reverse)
    expected = decay_scan(q.expand(-1, -1, 2, -1), k.expand(-1, -1, 2, -1), v, g, seg, chunk_size=16, reverse=reverse)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("strength", [0.0, 1e-6, 48.0, 1e4])
def test_extreme_decays_stay_exact_and_finite(strength, reverse):
    q, k, v, g = inputs(200, dtype=torch.float32)
    g = torch.where(g < -0.5, -strength, g).requires_grad_()
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    seg = random_segments(1, 200, 3)
    y = decay_scan(q, k, v, g, seg, chunk_size=16, reverse=reverse)
    expected = decay_recurrence(*(t.detach().double() for t in (q, k, v, g)), seg, reverse=reverse)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v, g))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 200])
def test_documents_are_bitwise_apart(reverse, chunk_size):
    tensors = [t.requires_grad_() for t in inputs(100, dtype=torch.float32)]
    seg = segments(37, 40, 23)
    target = seg[0] == 2
    y = decay_scan(*tensors, seg, chunk_size=chunk_size, reverse=reverse)
    y[:, target].pow(3).sum().backward()
    for t in tensors:
        assert torch.all(t.grad[:, ~target] == 0)
        assert torch.any(t.grad[:, target] != 0)
    others = inputs(100, dtype=torch.float32, seed=1)
    mixed = [torch.where(target[None, :, None, None][..., 0] if t.ndim == 3 else target[None, :, None, None], t, o)
             for t, o in zip(tensors, others)]  # fmt: skip
    assert torch.equal(decay_scan(*mixed, seg, chunk_size=chunk_size, reverse=reverse)[:, target], y[:, target])


def test_memory_kept_for_backward_is_linear():
    def kept(tokens):
        q, k, v, g = (t.requires_grad_() for t in inputs(tokens, heads=1, dtype=torch.float32))
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, id):
            decay_scan(q, k, v, g, segments(tokens), chunk_size=16)
        return sum(sizes.values())

    assert kept(2048) < 2.1 * kept(1024)
