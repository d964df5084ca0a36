"""Rows 1 to 5: decay scans, retention and SSD."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tbf.model.config import UltraConfig
from tbf.model.mixers.retention import Retention
from tbf.model.norms import rms
from tbf.model.segment_info import SegmentInfo
from tbf.ops.decay_scan import decay_scan, retention_scan
from tbf.ops.rope import apply_rope
from tbf.ops.segments import segment_conv
from tests.ops.reference import decay_recurrence, random_segments, retention_matrix
from tests.parity.conftest import absolute, random, relative


def scan_inputs(tokens, dtype=torch.float64, heads=3, key=16, value=8):
    q, k = (random(2, tokens, heads, key, seed=i, dtype=dtype) for i in range(2))
    v = random(2, tokens, heads, value, seed=2, dtype=dtype)
    return q, k, v, -random(2, tokens, heads, seed=3, dtype=dtype).abs()


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("reverse", "inclusive"), [(False, True), (False, False), (True, True), (True, False)])
def test_scan_against_the_recurrence(measured, chunk_size, packed, reverse, inclusive):
    q, k, v, g = scan_inputs(200)
    seg = random_segments(2, 200, 6 if packed else 1)
    got = decay_scan(q, k, v, g, seg, chunk_size=chunk_size, reverse=reverse, inclusive=inclusive)
    expected = decay_recurrence(q, k, v, g, seg, reverse=reverse, inclusive=inclusive)
    measured(1, "decay scan, FP64", "token recurrence", absolute(got, expected), 1e-11)


def test_scan_gradients(measured):
    tensors = [t[:1, :12, :1, :2].requires_grad_() if t.ndim == 4 else t[:1, :12, :1].requires_grad_()
               for t in scan_inputs(12)]  # fmt: skip
    seg, worst = random_segments(1, 12, 3), 0.0
    for reverse in (False, True):
        y = decay_scan(*tensors, seg, chunk_size=4, reverse=reverse)
        expected = decay_recurrence(*tensors, seg, reverse=reverse)
        for ours, theirs in zip(*(torch.autograd.grad(t.pow(3).sum(), tensors) for t in (y, expected))):
            worst = max(worst, absolute(ours, theirs))
    measured(1, "its gradients, FP64", "autograd through the recurrence", worst, 1e-11)


@pytest.fixture(scope="module")
def fla():
    """Loads a reference file of flash-linear-attention by its path: the package itself needs Triton."""
    pytest.importorskip("einops")
    spec = importlib.util.find_spec("fla")
    if spec is None:
        pytest.skip("fla-core is not installed")

    def load(operation):
        file = Path(spec.submodule_search_locations[0]) / "ops" / operation / "naive.py"
        module_spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_scan_against_fla(measured, fla, form):
    q, k, v, g = scan_inputs(256, torch.float32, key=32, value=32)
    function = getattr(fla("simple_gla"), f"naive_{form}_simple_gla")
    expected, _ = function(q, k, v, g)
    got = decay_scan(q * 32**-0.5, k, v, g, torch.ones(2, 256, dtype=torch.long))
    measured(2, "decay scan", f"fla naive_{form}_simple_gla", absolute(got, expected), 2e-4)


def test_scan_against_fla_retention(measured, fla):
    q, k, v, _ = scan_inputs(256, torch.float32, key=32, value=32)
    expected = fla("retention").naive_retention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    log_gamma = torch.log1p(-(2.0 ** (-5 - torch.arange(3.0)))).expand(2, 256, 3)
    got = decay_scan(q * 32**-0.5, k, v, log_gamma, torch.ones(2, 256, dtype=torch.long))
    measured(2, "decay scan, constant decay", "fla naive_retention", absolute(got, expected), 2e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_symmetric_retention_against_its_matrix(measured, packed):
    q, k, v, _ = scan_inputs(300)
    log_gamma = torch.tensor([1 / 32, 1 / 100, 1 / 512], dtype=torch.float64).neg().log1p()
    seg = random_segments(2, 300, 5 if packed else 1)
    got = retention_scan(q, k, v, log_gamma, seg)
    expected = retention_matrix(q, k, v, log_gamma, seg)
    measured(3, "symmetric retention, FP64", "explicit matrix", absolute(got, expected), 1e-11)


def paper_retention(x, weights, w_out, gamma, rates, *, causal):
    """RetNet's multi-scale retention (2307.08621, section 2) in its parallel form, complex, FP64, one row.

    x [T, D]; weights W_q, W_k, W_v, W_g [D, D]; gamma [H]; rates [K / 2], turns per token.
    """
    tokens, heads = len(x), len(gamma)
    q, k, v, gate = (x @ w.T for w in weights)
    width = q.shape[1] // heads
    place = torch.arange(tokens, dtype=torch.float64)
    turn = torch.exp(1j * place[:, None] * rates)  # e^{i n theta}
    heads_out = []
    for h in range(heads):
        columns = slice(h * width, (h + 1) * width)
        complex_q = torch.view_as_complex(q[:, columns].reshape(tokens, -1, 2).contiguous()) * turn
        complex_k = torch.view_as_complex(k[:, columns].reshape(tokens, -1, 2).contiguous()) * turn
        distance = place[:, None] - place
        decay = gamma[h] ** distance.abs()
        if causal:
            decay = decay * (distance >= 0)
        decay = decay / decay.sum(1, keepdim=True).sqrt()
        scores = (complex_q @ complex_k.conj().T).real * width**-0.5 * decay
        scores = scores / scores.sum(1, keepdim=True).abs().clamp(min=1)
        y = scores @ v[:, columns]
        heads_out.append(y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt())
    return (gate / (1 + torch.exp(-gate)) * torch.cat(heads_out, 1)) @ w_out.T


def test_causal_retention_layer_against_the_paper(measured):
    width, heads, tokens = 64, 4, 120
    weights = [random(width, width, seed=i) * width**-0.5 for i in range(5)]
    x, head = random(1, tokens, width, seed=9), width // heads
    rates = 10_000.0 ** -torch.linspace(0, 1, head // 2, dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    angles = torch.arange(tokens)[:, None] * rates
    cos, sin = angles.cos().float(), angles.sin().float()

    q, k, v, gate = (x @ w.T for w in weights[:4])
    q, k, v = (t.unflatten(-1, (heads, head)) for t in (q, k, v))
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin) * head**-0.5
    g = gamma.log().float().expand(1, tokens, heads)
    y = decay_scan(q, k, v, g, torch.ones(1, tokens, dtype=torch.long))
    got = (F.silu(gate) * rms(y).flatten(2)) @ weights[4].T
    double = [w.double() for w in weights]
    expected = paper_retention(x[0].double(), double[:4], double[4], gamma, rates, causal=True)
    measured(
        4, "causal retention layer", "paper's parallel form, normalisers and all", relative(got[0], expected), 2e-5
    )


def test_retention_mixer_against_the_paper(measured):
    """Ours is bidirectional and has SubLN before the output projection, so the oracle gets both."""
    config = UltraConfig(hidden_size=64, retention_heads=4, layer_pattern=["retnet"], use_bitnet=False)
    mixer = Retention(config)
    x, seg = random(1, 120, 64), torch.ones(1, 120, dtype=torch.long)
    got = mixer(x, SegmentInfo.build(config, seg), lambda t: t)
    weights = [w.detach().double() for w in mixer.qkvg_proj.weight.split(64)]
    rates = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    gamma = torch.tensor([1 - 1 / 32 * 16 ** (-i / 3) for i in range(4)], dtype=torch.float64)  # 1 - (1/32 ... 1/512)
    gated = paper_retention(x[0].double(), weights, torch.eye(64, dtype=torch.float64), gamma, rates, causal=False)
    gated = gated / (gated.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = gated @ mixer.out_proj.weight.detach().double().T
    measured(4, "retnet mixer", "paper's parallel form, symmetric decay", relative(got[0], expected), 2e-5)


@pytest.fixture(scope="module")
def mamba2():
    return pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="transformers is not installed")


def test_ssd_core_against_transformers(measured, mamba2):
    heads, width, state, tokens = 4, 16, 32, 150
    x, dt = random(2, tokens, heads, width), random(2, tokens, heads, seed=1).abs()
    rate, skip = -random(heads, seed=2).exp(), random(heads, seed=3)
    b, c = random(2, tokens, 1, state, seed=4), random(2, tokens, 1, state, seed=5)
    expected = mamba2.mamba2_chunk_scan(x, dt, rate, b, c, 64, D=skip)
    got = decay_scan(c, b, x * dt[..., None], dt * rate, torch.ones(2, tokens, dtype=torch.long))
    got = got + x * skip[:, None]
    measured(5, "SSD scan", "transformers mamba2_chunk_scan", relative(got, expected), 2e-6)


def test_ssd_layer_against_transformers(measured, mamba2):
    from transformers import Mamba2Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 32, "expand": 2, "n_groups": 1}
    layer = mamba2.Mamba2Mixer(Mamba2Config(**sizes, conv_kernel=4, chunk_size=32, use_conv_bias=True), 0).eval()
    with torch.no_grad():
        layer.A_log.uniform_(0, 2.7)
        layer.dt_bias.normal_()
        layer.D.normal_()
    x, seg = random(2, 100, 64), torch.ones(2, 100, dtype=torch.long)
    gate, joined, dt = layer.in_proj(x).split((128, 128 + 64, 8), -1)
    causal = F.pad(layer.conv1d.weight[:, 0], (0, 3))  # a symmetric convolution whose later taps are zero
    joined = F.silu(segment_conv(joined, causal, seg) + layer.conv1d.bias)
    values, b, c = joined.split((128, 32, 32), -1)
    values, dt = values.unflatten(-1, (8, 16)), F.softplus(dt + layer.dt_bias)
    rate = -layer.A_log.exp()
    y = decay_scan(c[:, :, None], b[:, :, None], values * dt[..., None], dt * rate, seg) + values * layer.D[:, None]
    y = F.rms_norm(y.flatten(2) * F.silu(gate), (128,), layer.norm.weight, layer.norm.variance_epsilon)
    measured(5, "causal SSD layer", "transformers Mamba2Mixer", relative(layer.out_proj(y), layer(x)), 2e-6)
