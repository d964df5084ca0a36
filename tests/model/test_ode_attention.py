"""The ODE mixer returns a bounded increment."""

import pytest
import torch

from tbf.model.mixers.ode_attention import OdeAttention
from tbf.model.norms import rms
from tbf.model.segment_info import SegmentInfo


def build(config, scale=1.0):
    torch.manual_seed(0)
    mixer = OdeAttention(config)
    with torch.no_grad():
        for projection in (mixer.qkv_proj, mixer.out_proj):
            torch.nn.init.trunc_normal_(projection.weight, std=0.02)
            projection.weight.mul_(scale)
        mixer.stage_scale.normal_(std=0.1)
    return mixer


def test_zero_field_gives_zero_increment(tiny):
    config = tiny(layer_pattern=["ode"])
    mixer = build(config)
    torch.nn.init.zeros_(mixer.tau)
    x = torch.randn(2, 6, 32)
    assert torch.all(mixer(x, SegmentInfo.build(config, torch.ones(2, 6, dtype=torch.long)), rms) == 0)


@pytest.mark.parametrize("steps", [1, 3])
def test_increment_is_classical_rk4(tiny, steps):
    config = tiny(layer_pattern=["ode"], ode_steps=steps)
    mixer = build(config, scale=5.0)
    info = SegmentInfo.build(config, torch.ones(2, 6, dtype=torch.long))

    def field(z, stage):
        return mixer.tau[0] * rms(mixer.mix(rms(z) * (1 + mixer.stage_scale[stage]), info), 1e-2)

    x = torch.randn(2, 6, 32)
    z, h = x, 1 / steps
    for _ in range(steps):
        k1 = field(z, 0)
        k2 = field(z + h / 2 * k1, 1)
        k3 = field(z + h / 2 * k2, 2)
        k4 = field(z + h * k3, 3)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(mixer(x, info, rms), z - x, rtol=1e-5, atol=1e-6)


def test_increment_is_bounded_whatever_the_weights(tiny):
    config = tiny(layer_pattern=["ode"])
    mixer = build(config, scale=1e3)
    info = SegmentInfo.build(config, torch.ones(2, 6, dtype=torch.long))
    increment = mixer(torch.randn(2, 6, 32), info, rms)
    assert increment.norm(dim=-1).max() <= 0.1 * 32**0.5 * 1.001  # tau sqrt(D)


@pytest.mark.parametrize("bitnet", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradient_gain_stays_near_one_with_weights_times_ten(tiny, steps, bitnet):
    config = tiny(layer_pattern=["ode"], hidden_size=64, ode_steps=steps, use_bitnet=bitnet)
    mixer = build(config, scale=10.0)
    info = SegmentInfo.build(config, torch.ones(2, 64, dtype=torch.long))
    x = torch.randn(2, 64, 64, requires_grad=True)
    upstream = torch.randn_like(x)
    (x + mixer(x, info, rms)).backward(upstream)
    assert x.grad.norm() / upstream.norm() <= 1.3


def test_nested_checkpoint_gives_the_same_gradients(tiny):
    config = tiny(layer_pattern=["ode"], ode_steps=2)
    info = SegmentInfo.build(config, torch.ones(2, 6, dtype=torch.long))
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    gradients = []
    for nested in (False, True):
        mixer = build(config, scale=5.0)
        mixer.checkpoint_steps = nested
        mixer(x, info, rms).square().sum().backward()
        gradients.append([p.grad for p in mixer.parameters()])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)
