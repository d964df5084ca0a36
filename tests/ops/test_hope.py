"""HoPE attention against boosts computed pair by pair in FP64."""

import pytest
import torch

from tbf.errors import ConfigError
from tbf.ops.hope import hope_attention, hope_rates, hope_scores
from tests.ops.reference import hope_pairwise, masked_attention, random_segments, segments


def inputs(tokens, *, batch=1, heads=3, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(3, batch, heads, tokens, width, generator=generator).to(dtype)
    return (*qkv, *hope_rates(heads, width, 10_000.0, 0.01))


@pytest.mark.parametrize("block_size", [1, 7, 64, 512])
def test_scores_equal_the_boosts(block_size):
    q, k, _, *rates = inputs(300)
    got = hope_scores(q, k, *rates, block_size=block_size)
    expected = hope_pairwise(q, k, *rates)
    assert ((got - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.parametrize("window", [0, 2, 50])
@pytest.mark.parametrize("block_size", [7, 64, 512])
def test_attention_inside_documents_and_windows(window, block_size):
    q, k, v, *rates = inputs(200, batch=2)
    seg = random_segments(2, 200, 4)
    expected = masked_attention(hope_pairwise(q, k, *rates), v, seg, window)
    got = hope_attention(q, k, v, *rates, seg, window=window, block_size=block_size)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_shifting_a_document_changes_nothing():
    q, k, v, *rates = inputs(600)
    alone = hope_attention(q[:, :, :80], k[:, :, :80], v[:, :, :80], *rates, segments(80))
    q, k, v = (t.roll(470, 2) for t in (q, k, v))  # across the edge between two blocks
    shifted = hope_attention(q, k, v, *rates, segments(470, 80, 50))[:, :, 470:550]
    torch.testing.assert_close(shifted, alone, rtol=2e-5, atol=2e-6)


def test_gradients():
    q, k, v, *rates = inputs(6, heads=2, width=4, dtype=torch.float64)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    rates, seg = [r.double() for r in rates], segments(4, 2)
    for window in (0, 2):
        assert torch.autograd.gradcheck(
            lambda *t, w=window: hope_attention(*t, *rates, seg, window=w, block_size=4), (q, k, v)
        )


@pytest.mark.parametrize("window", [0, 64])
def test_long_rows_keep_no_score_matrix(window):
    tokens = 2304
    q, k, v, *rates = inputs(tokens, heads=1)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = hope_attention(q, k, v, *rates, segments(1000, 1304), window=window)
    assert sum(saved) < 100 * q.numel() < tokens * tokens
    y.square().sum().backward()
    plain = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    scores = hope_scores(*plain[:2], *rates)
    masked_attention(scores, plain[2], segments(1000, 1304), window).square().sum().backward()
    for ours, reference in zip((q, k, v), plain):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_any_length_is_finite():
    """Across 5 000 tokens, boosts counted from the middle of the row would need exp(312)."""
    q, k, v, *rates = inputs(5000, heads=1, width=2)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    y = hope_attention(q, k, v, *rates, segments(5000))
    y[:, :, -1].sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize("damping", [1e-6, 0.01, 5.0])
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (16, 128)])
def test_every_channel_decays(damping, heads, width):
    theta, theta_prime = hope_rates(heads, width, 10_000.0, damping)
    assert theta.shape == (heads, width // 2)
    assert torch.all(theta > 0)
    assert torch.all(theta < theta_prime[:, None])
    assert theta_prime.max() <= 1 / 16


@pytest.mark.parametrize("block_size", [0, 513])
def test_refuses_block_sizes_that_could_overflow(block_size):
    q, k, v, *rates = inputs(4)
    with pytest.raises(ConfigError, match=f"block_size is {block_size}"):
        hope_attention(q, k, v, *rates, segments(4), block_size=block_size)
