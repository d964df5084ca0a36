"""Row 10: the fixed-step solver and the bounded field."""

import math

import pytest
import torch

from tbf.model.config import UltraConfig
from tbf.model.mixers.ode_attention import OdeAttention
from tbf.model.norms import rms
from tbf.model.segment_info import SegmentInfo
from tbf.ops.rk4 import integrate
from tests.parity.conftest import absolute, random

WEIGHT = random(6, 6, dtype=torch.float64)
START = random(6, seed=1, dtype=torch.float64)


def field(z):
    return torch.tanh(WEIGHT @ z) - 0.3 * z


def test_step_against_torchdiffeq(measured):
    common = pytest.importorskip("torchdiffeq._impl.rk_common", reason="torchdiffeq is not installed")
    z = START
    for step in range(4):
        t = torch.tensor(step / 4, dtype=torch.float64)
        z = z + common.rk4_step_func(lambda t, y, perturb=None: field(y), t, 0.25, t + 0.25, z)
    got = integrate(lambda z, stage: field(z), START, steps=4)
    measured(10, "classical RK4, FP64", "torchdiffeq rk4_step_func", absolute(got, z - START), 1e-14)


def test_order_against_dopri5(measured):
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    exact = torchdiffeq.odeint(lambda t, y: field(y), START, ends, method="dopri5", rtol=1e-12, atol=1e-13)
    errors = [absolute(START + integrate(lambda z, stage: field(z), START, steps=n), exact[1]) for n in (2, 4, 8, 16)]
    order = math.log2(errors[-2] / errors[-1])
    measured(10, "order of convergence short of 4 by", "torchdiffeq dopri5, rtol 1e-12", max(0.0, 4 - order), 0.3)


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradient_gain_with_weights_times_ten(measured, steps, ternary):
    config = UltraConfig(hidden_size=128, num_heads=4, layer_pattern=["ode"], ode_steps=steps, use_bitnet=ternary)
    torch.manual_seed(0)
    mixer = OdeAttention(config)
    with torch.no_grad():
        for projection in (mixer.qkv_proj, mixer.out_proj):
            torch.nn.init.trunc_normal_(projection.weight, std=0.02)
            projection.weight.mul_(10)
    info = SegmentInfo.build(config, torch.ones(2, 64, dtype=torch.long))
    gains = []
    for seed in range(3):
        x, upstream = random(2, 64, 128, seed=seed).requires_grad_(), random(2, 64, 128, seed=10 + seed)
        (x + mixer(x, info, rms)).backward(upstream)
        gains.append((x.grad.norm() / upstream.norm()).item())
    kind = "ternary" if ternary else "FP32"
    measured(10, f"ODE gradient gain, weights x10, {steps} steps, {kind}", "bound", max(gains), 1.3)
