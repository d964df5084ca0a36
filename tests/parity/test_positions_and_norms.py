"""Rows 8 and 9: HoPE, RoPE, Derf and DyT."""

import math

import pytest
import torch

from tbf.model.norms import Derf, DynamicTanh
from tbf.ops.hope import hope_attention, hope_rates, hope_scores
from tbf.ops.rope import apply_rope, rope_angles
from tests.ops.reference import hope_pairwise, segments
from tests.parity.conftest import absolute, random, relative


@pytest.mark.parametrize("tokens", [256, 1024])
def test_hope_against_pairwise_boosts(measured, tokens):
    q, k = random(1, 2, tokens, 8), random(1, 2, tokens, 8, seed=1)
    rates = hope_rates(2, 8, 10_000.0, 0.01)
    error = relative(hope_scores(q, k, *rates), hope_pairwise(q, k, *rates))
    measured(8, f"HoPE logits, T={tokens}", "boosts pair by pair, FP64", error, 2e-6)


def test_hope_depends_on_distance_only(measured):
    rates = hope_rates(4, 16, 10_000.0, 0.01)
    q, k, v = (random(1, 4, 900, 16, seed=i) for i in range(3))
    alone = hope_attention(*(t[:, :, :100] for t in (q, k, v)), *rates, segments(100))
    q, k, v = (t.roll(650, 2) for t in (q, k, v))
    moved = hope_attention(q, k, v, *rates, segments(650, 100, 150))[:, :, 650:750]
    measured(8, "HoPE, document moved by 650 tokens", "the same at the row's start", relative(moved, alone), 2e-6)


def test_hope_is_finite_on_long_rows(measured):
    rates = hope_rates(1, 2, 10_000.0, 0.01)
    tensors = [random(1, 1, 4096, 2, seed=i).requires_grad_() for i in range(3)]
    y = hope_attention(*tensors, *rates, segments(4096))
    (y[:, :, -1].sum() + y[:, :, 0].sum()).backward()
    broken = sum((~torch.isfinite(t)).sum().item() for t in (y, *(t.grad for t in tensors)))
    measured(8, "HoPE, T=4096: values and gradients that aren't finite", "none", broken, 0)


def test_rope_against_modernbert(measured):
    modernbert = pytest.importorskip(
        "transformers.models.modernbert.modeling_modernbert", reason="transformers is not installed"
    )
    tokens, width = 512, 32
    q, k = random(2, 3, tokens, width), random(2, 3, tokens, width, seed=1)
    rates = 1.0 / (10_000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width))
    angles = (torch.arange(tokens)[:, None] * rates).repeat(1, 2)[None]  # their order: all first, all second
    expected = modernbert.apply_rotary_pos_emb(q, k, angles.cos().float(), angles.sin().float())
    cos, sin = rope_angles(tokens, width, 10_000.0, q.device, q.dtype)

    def ours(x):
        pairs = x.unflatten(-1, (2, -1)).mT.flatten(-2)  # to interleaved pairs
        turned = apply_rope(pairs.transpose(1, 2), cos, sin).transpose(1, 2)
        return turned.unflatten(-1, (-1, 2)).mT.flatten(-2)

    error = max(absolute(ours(x), y) for x, y in zip((q, k), expected))
    measured(8, "rotary positions", "transformers ModernBERT", error, 1e-5)


CURVES = {
    "derf": (Derf, math.erf, lambda z: 2 / math.sqrt(math.pi) * math.exp(-z * z)),
    "dynamic_tanh": (DynamicTanh, math.tanh, lambda z: 1 - math.tanh(z) ** 2),
}


@pytest.mark.parametrize("name", CURVES)
def test_pointwise_norms_against_their_formulas(measured, name):
    """Value and analytic gradients from the standard library's functions, number by number."""
    build, curve, slope = CURVES[name]
    norm, x, upstream = build(6), random(5, 6) * 2, random(5, 6, seed=1)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(random(*parameter.shape, seed=10 + seed))
    x.requires_grad_()
    y = norm(x)
    y.backward(upstream)
    alpha = norm.alpha.item()
    shift = norm.shift.item() if name == "derf" else 0.0
    values, grad_x = torch.empty(5, 6, dtype=torch.float64), torch.empty(5, 6, dtype=torch.float64)
    grads = {"weight": torch.zeros(6).double(), "bias": torch.zeros(6).double(), "alpha": 0.0, "shift": 0.0}
    for t in range(5):
        for d in range(6):
            number, up = x[t, d].item(), upstream[t, d].item()
            gain, z = norm.weight[0, d].item(), alpha * number + shift
            values[t, d] = gain * curve(z) + norm.bias[0, d].item()
            through = up * gain * slope(z)
            grad_x[t, d] = through * alpha
            grads["weight"][d] += up * curve(z)
            grads["bias"][d] += up
            grads["alpha"] += through * number
            grads["shift"] += through
    errors = [relative(y, values), relative(x.grad, grad_x)]
    for key, parameter in norm.named_parameters():
        errors.append(relative(parameter.grad.flatten(), torch.as_tensor(grads[key]).double().flatten()))
    measured(9, f"{name}, values and gradients", "formula in FP64", max(errors), 3e-7)
