"""Fixed-step solvers on equations with known solutions."""

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tbf.errors import ConfigError
from tbf.ops.rk4 import integrate


def test_one_rk4_step_is_the_fourth_order_taylor_sum():
    z0 = torch.tensor([2.0], dtype=torch.float64)
    got = integrate(lambda z, stage: z, z0, solver="rk4", steps=1)
    torch.testing.assert_close(got, z0 * (1 + 1 / 2 + 1 / 6 + 1 / 24))


def test_euler_is_compound_interest():
    z0 = torch.tensor([2.0], dtype=torch.float64)
    got = integrate(lambda z, stage: 0.5 * z, z0, solver="euler", steps=4)
    torch.testing.assert_close(got, z0 * (1.125**4 - 1))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("rk4", 4)])
def test_order(solver, order):
    z0 = torch.tensor([1.0], dtype=torch.float64)
    exact = math.tan(math.atan(1.0) + 0.5) - 1  # dz/dt = (1 + z^2) / 2
    errors = [
        abs(integrate(lambda z, stage: (1 + z * z) / 2, z0, solver=solver, steps=n).item() - exact) for n in (8, 16)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("solver", "stages"), [("rk4", [0, 1, 2, 3]), ("euler", [0])])
def test_stages_are_counted_inside_each_step(solver, stages):
    seen = []
    integrate(lambda z, stage: seen.append(stage) or z, torch.ones(1), solver=solver, steps=2)
    assert seen == stages * 2


def test_checkpointed_steps_give_the_same_gradients():
    weight = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z0 = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def gradients(recompute):
        y = integrate(lambda z, stage: torch.tanh(weight @ z), z0, steps=3, checkpoint=recompute)
        return torch.autograd.grad(y.sum(), (z0, weight))

    for plain, recomputed in zip(gradients(None), gradients(partial(checkpoint, use_reentrant=False))):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(("kwargs", "message"), [({"solver": "heun"}, "heun.*rk4"), ({"steps": 0}, "ode_steps is 0")])
def test_refuses(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        integrate(lambda z, stage: z, torch.ones(1), **kwargs)
