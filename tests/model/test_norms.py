"""Norms against their formulas, and their gradients."""

import pytest
import torch

from tbf.model.norms import NORMS, build_norm, rms

SIZE, LOOPS = 6, 2


def filled(name):
    torch.manual_seed(0)
    norm = NORMS[name](SIZE, loops=LOOPS, eps=1e-5).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return norm


def formula(name, norm, x, loop):
    p = {key: value[loop] for key, value in norm.named_parameters()}
    if name == "rms":
        return p["weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if name == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        return p["weight"] * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + p["bias"]
    if name == "derf":
        return p["weight"] * torch.erf(p["alpha"] * x + p["shift"]) + p["bias"]
    return p["weight"] * torch.tanh(p["alpha"] * x) + p["bias"]


@pytest.mark.parametrize("loop", range(LOOPS))
@pytest.mark.parametrize("name", NORMS)
def test_norm_matches_its_formula(name, loop):
    norm, x = filled(name), 3 * torch.randn(4, 5, SIZE, dtype=torch.float64)
    torch.testing.assert_close(norm(x, loop), formula(name, norm, x, loop), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_norm_gradients(name):
    norm = filled(name)
    names, values = zip(*norm.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(norm, dict(zip(names, parameters)), (x, 1))

    x = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *values))


def test_pointwise_norms_have_scalar_slopes():
    assert NORMS["derf"](SIZE, loops=LOOPS).alpha.shape == (LOOPS,)
    assert NORMS["derf"](SIZE, loops=LOOPS).shift.shape == (LOOPS,)
    assert NORMS["dynamic_tanh"](SIZE, loops=LOOPS).alpha.shape == (LOOPS,)
    x = torch.tensor([[0.3, -1.0, 2.0, 0.0, 9.0, -9.0]])
    torch.testing.assert_close(NORMS["derf"](SIZE)(x), torch.erf(0.5 * x))
    torch.testing.assert_close(NORMS["dynamic_tanh"](SIZE)(x), torch.tanh(0.5 * x))


@pytest.mark.parametrize("name", NORMS)
def test_loop_beyond_the_trained_ones_uses_the_last_row(name):
    norm, x = filled(name), torch.randn(3, SIZE, dtype=torch.float64)
    assert torch.equal(norm(x, 7), norm(x, LOOPS - 1))
    assert not torch.equal(norm(x, 0), norm(x, 1))


@pytest.mark.parametrize("name", NORMS)
def test_build_norm_follows_the_config(tiny, name):
    norm = build_norm(tiny(norm_type=name, num_loops=3, layer_pattern=["retnet"]))
    assert isinstance(norm, NORMS[name])
    assert norm.weight.shape == (3, 32)
    assert {key for key, _ in norm.named_parameters()} == norm.no_weight_decay


def test_rms_has_unit_mean_square():
    torch.testing.assert_close(rms(5 * torch.randn(4, 64)).square().mean(-1), torch.ones(4), rtol=1e-4, atol=0)
