"""The dense feed-forward block against its formulas."""

import pytest
import torch
import torch.nn.functional as F

from tbf.model.ffn import PLAIN, FeedForward

FORMULAS = {
    "relu2": lambda a: a.clamp(min=0) ** 2,
    "silu": lambda a: a * torch.sigmoid(a),
    "gelu": lambda a: a * (1 + torch.erf(a / 2**0.5)) / 2,
    "swiglu": lambda a, b: a * torch.sigmoid(a) * b,
    "geglu": lambda a, b: a * (1 + torch.erf(a / 2**0.5)) / 2 * b,
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_dense_block_follows_its_formula(tiny, activation):
    torch.manual_seed(0)
    ffn = FeedForward(tiny(layer_pattern=["retnet"], ffn_activation=activation, ffn_hidden_size=24))
    u = torch.randn(2, 3, 32)
    pieces = (u @ ffn.up_proj.weight.T).split(24, -1)
    inner = F.rms_norm(FORMULAS[activation](*pieces), (24,), eps=1e-5)
    out, stats = ffn(u, None)
    torch.testing.assert_close(out, inner @ ffn.down_proj.weight.T, rtol=1e-4, atol=1e-5)
    assert stats is None


def test_squared_relu_has_the_gradient_of_its_formula():
    x = torch.tensor([-2.0, -0.5, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PLAIN["relu2"], x)
