import pytest
import torch

from tbf.errors import ConfigError
from tbf.model.bitlinear import BitLinear


def published_bitlinear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The published formulas with their usual straight-through form."""
    s = 1.0 / weight.abs().mean().clamp_(min=1e-5)
    w_q = (weight * s).round().clamp(-1, 1) / s
    t = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    x_q = (x * t).round().clamp(-128, 127) / t
    return (x + (x_q - x).detach()) @ (weight + (w_q - weight).detach()).T


def test_matches_the_published_formulas_forward_and_backward():
    torch.manual_seed(0)
    layer = BitLinear(48, 32).double()
    x = torch.randn(5, 7, 48, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, 7, 32, dtype=torch.float64)
    mine = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    reference = torch.autograd.grad(published_bitlinear(x, layer.weight), (x, layer.weight), dy)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b)


def test_fused_projection_has_a_scale_per_slice():
    torch.manual_seed(0)
    layer = BitLinear(16, (8, 24))
    with torch.no_grad():
        layer.weight[8:] *= 100
    x = torch.randn(3, 16)
    small, large = layer(x)
    torch.testing.assert_close(small, published_bitlinear(x, layer.weight[:8]))
    torch.testing.assert_close(large, published_bitlinear(x, layer.weight[8:]), rtol=1e-5, atol=1e-4)


def test_sub_norm_normalises_before_quantising():
    torch.manual_seed(0)
    layer = BitLinear(16, 8, sub_norm=True)
    with torch.no_grad():
        layer.sub_norm.uniform_(0.5, 2)
    x = torch.randn(3, 16) * 50
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.sub_norm
    torch.testing.assert_close(layer(x), published_bitlinear(normed, layer.weight))


def test_dense_twin_has_the_same_parameters():
    dense, ternary = BitLinear(16, (8, 4), ternary=False, sub_norm=True), BitLinear(16, (8, 4), sub_norm=True)
    dense.load_state_dict(ternary.state_dict())
    x = torch.randn(2, 16)
    normed = torch.nn.functional.rms_norm(x, (16,), eps=1e-5)
    torch.testing.assert_close(torch.cat(dense(x), -1), normed @ dense.weight.T)


def test_meta_device():
    with torch.device("meta"):
        layer = BitLinear(16, (8, 4), sub_norm=True)
        a, b = layer(torch.empty(2, 3, 16))
    assert a.shape == (2, 3, 8) and b.shape == (2, 3, 4) and a.is_meta


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4, ()), (4, (2, 0))])
def test_impossible_sizes(shape):
    with pytest.raises(ConfigError, match="positive"):
        BitLinear(*shape)
