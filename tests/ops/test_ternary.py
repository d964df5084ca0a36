"""The ternary linear map against the published formulas and FP64, on every backend that this machine has."""

import pytest
import torch
from torch import Tensor

import tbf.ops.ternary as ternary
from tbf.errors import ConfigError, HardwareError
from tbf.ops.ternary import ternary_experts_linear, ternary_fake_quant, ternary_linear
from tbf.ops.ternary_backends import BACKENDS, TernaryPlan, get_backend
from tbf.ops.ternary_cache import TernaryCache


def served(name: str) -> bool:
    try:
        get_backend(name, "cpu")
    except HardwareError:
        return False
    return True


CPU = [name for name in BACKENDS if served(name)]
SHAPES = [(1, 1, 1), (5, 3, 2), (37, 20, 50), (70, 64, 48), (130, 131, 33)]


def published(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The published formulas (their scales as divisors), in FP64: the values that are multiplied."""
    x, weight = x.double(), weight.double()
    w_scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)
    x_scale = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * x_scale).round().clamp(-128, 127) / x_scale, (weight * w_scale).round().clamp(-1, 1) / w_scale


def run(x: Tensor, weight: Tensor, plan: TernaryPlan | None, **options: object) -> tuple[Tensor, ...]:
    return ternary_linear(x, weight, TernaryCache(), plan=plan, **options)


def sample(m: int, d: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + d + n)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return make(m, d).requires_grad_(), make(n, d).requires_grad_(), make(m, n) * 1e-6


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_published_one(name, shape):
    x, weight, _ = sample(*shape)
    (y,) = run(x, weight, TernaryPlan(name, name))
    xq, wq = published(x.detach(), weight.detach())
    torch.testing.assert_close(y.double(), xq @ wq.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_has_the_same_bits_everywhere(shape):
    x, weight, _ = sample(*shape)
    slices = (weight.shape[0],) if weight.shape[0] < 3 else (weight.shape[0] - 2, 2)
    results = [run(x, weight, TernaryPlan(name, name), slices=slices) for name in CPU]
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize(
    ("mode", "tolerance"), [("fp32", 1e-5), ("int8_hilo", 2e-4), ("int8", 0.05), ("int8_dx", 0.05)]
)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gradients_use_the_quantised_operands(name, mode, tolerance, shape):
    x, weight, dy = sample(*shape)
    (y,) = run(x, weight, TernaryPlan(name, name, mode))
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    xq, wq = published(x.detach(), weight.detach())
    assert (dx - dy.double() @ wq).norm() <= tolerance * (dy.double() @ wq).norm()
    assert (dw - dy.double().T @ xq).norm() <= (1e-5 if mode == "int8_dx" else tolerance) * (dy.double().T @ xq).norm()


@pytest.mark.parametrize("mode", ["int8_hilo", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_backends_agree_on_gradients(mode, shape):
    x, weight, dy = sample(*shape)
    found = []
    for name in (name for name in CPU if name != "fp32"):
        (y,) = run(x, weight, TernaryPlan(name, name, mode))
        found.append(torch.autograd.grad(y, (x, weight), dy))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("mode", ["int8_hilo", "int8"])
def test_fused_slices_are_separate_layers(name, mode):
    x, weight, dy = sample(33, 24, 42)
    slices, plan = (5, 32, 5), TernaryPlan(name, name, mode)
    ys = run(x, weight, plan, slices=slices)
    alone = [run(x, part, plan)[0] for part in weight.split(slices)]
    assert all(map(torch.equal, ys, alone))
    (dx, dw) = torch.autograd.grad(ys, (x, weight), dy.split(slices, 1))
    (dx_alone, dw_alone) = torch.autograd.grad(alone, (x, weight), dy.split(slices, 1))
    assert torch.equal(dw, dw_alone)
    torch.testing.assert_close(
        dx, dx_alone, rtol=0, atol=(3e-4 if mode == "int8_hilo" else 3e-2) * dx.abs().max().item()
    )


@pytest.mark.parametrize("name", CPU)
def test_sub_norm(name):
    x, weight, dy = sample(9, 40, 16)
    gain = torch.rand(40, generator=torch.Generator().manual_seed(1)).add(0.5).requires_grad_()
    plan = TernaryPlan(name, name, "fp32")
    (fused,) = run(x, weight, plan, gain=gain, norm_eps=1e-5)
    (apart,) = run(torch.nn.functional.rms_norm(x, (40,), gain, 1e-5), weight, plan)
    torch.testing.assert_close(fused, apart, rtol=1e-4, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(fused, (x, weight, gain), dy), torch.autograd.grad(apart, (x, weight, gain), dy)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_sub_norm_has_the_same_bits_everywhere():
    x, weight, _ = sample(50, 300, 16)
    gain = torch.linspace(0.1, 3, 300)
    results = [run(x, weight, TernaryPlan(name, name), gain=gain, norm_eps=1e-5)[0] for name in CPU]
    assert all(torch.equal(other, results[0]) for other in results)


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_show(name, bad):
    x, weight, dy = sample(12, 16, 8)
    plan = TernaryPlan(name, name)
    with torch.no_grad():
        x[3, 5] = bad
    (y,) = run(x, weight, plan)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()
    _, dw = torch.autograd.grad(y, (x, weight), dy)
    assert dw.isnan().any()

    x, weight, dy = sample(12, 16, 8)
    dy[4, 2] = bad
    dx, dw = torch.autograd.grad(run(x, weight, plan)[0], (x, weight), dy)
    assert not dx[4].isfinite().all() and dx[5].isfinite().all()
    assert not dw[2].isfinite().all() and dw[3].isfinite().all()

    with torch.no_grad():
        weight[1, 1] = bad
    assert run(x, weight, plan)[0].isnan().all()


@pytest.mark.parametrize("name", CPU)
def test_no_rows(name):
    weight = torch.randn(6, 8, requires_grad=True)
    x = torch.zeros(2, 0, 8, requires_grad=True)
    (y,) = run(x, weight, TernaryPlan(name, name))
    assert y.shape == (2, 0, 6)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(6, 8)) and x.grad.shape == x.shape


@pytest.mark.parametrize("name", CPU)
def test_zero_rows_and_zero_gradients(name):
    x, weight, _ = sample(8, 16, 4)
    with torch.no_grad():
        x[2] = 0
    (y,) = run(x, weight, TernaryPlan(name, name))
    assert torch.equal(y[2], torch.zeros(4))
    dx, dw = torch.autograd.grad(y, (x, weight), torch.zeros(8, 4))
    assert torch.equal(dx, torch.zeros_like(dx)) and torch.equal(dw, torch.zeros_like(dw))


@pytest.mark.parametrize("name", CPU)
def test_any_memory_layout(name):
    x, weight, dy = sample(12, 16, 8)
    plan = TernaryPlan(name, name)
    (y,) = run(x, weight, plan)
    views = [
        x.detach().T.contiguous().T,
        torch.stack([x.detach(), x.detach() + 1], 1)[:, 0],
        torch.cat([x.detach(), x.detach()], 1)[:, 16:],
    ]
    assert all(torch.equal(run(view, weight, plan)[0], y) for view in views)
    assert torch.equal(run(x, weight.detach().T.contiguous().T, plan)[0], y)
    expected = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    for layout in (dy.T.contiguous().T, dy[:, :1].expand(12, 8)):
        got = torch.autograd.grad(y, (x, weight), layout, retain_graph=True)
        want = expected if layout.stride(1) else torch.autograd.grad(y, (x, weight), layout.clone(), retain_graph=True)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("mode", ["int8_hilo", "int8"])
def test_more_tokens_than_an_int32_can_sum_are_cut(mode, monkeypatch):
    x, weight, dy = sample(50, 16, 8)
    plan = TernaryPlan("cpu_int8", "cpu_int8", mode)
    (y,) = run(x, weight, plan)
    whole = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    monkeypatch.setattr(ternary, "MAX_TOKENS", 17)
    cut = torch.autograd.grad(y, (x, weight), dy)
    assert torch.equal(cut[0], whole[0])
    torch.testing.assert_close(cut[1], whole[1], rtol=0, atol=0.02 * whole[1].abs().max().item())
    assert not torch.equal(cut[1], whole[1])


def test_sums_stay_inside_an_int32_at_the_limit():
    tokens = ternary.MAX_TOKENS
    x = torch.full((tokens, 1), 2.0)
    x[::2] = -2.0
    weight = torch.ones(1, 1, requires_grad=True)
    for name in CPU:
        (y,) = run(x, weight, TernaryPlan(name, name, "int8"))
        (dw,) = torch.autograd.grad(y, weight, x)
        assert dw.item() == pytest.approx(4.0 * tokens, rel=1e-4)


@pytest.mark.parametrize("name", CPU)
def test_only_int8_activations_are_saved(name):
    x, weight, _ = sample(64, 128, 32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (y,) = run(x, weight, TernaryPlan(name, name))
    assert sum(t.nbytes for t in saved) <= x.numel() + 4 * len(x)
    linear = y.grad_fn.next_functions[0][0]
    assert linear.next_functions[1][0].variable is weight  # the engine's hooks fire


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("slices", [None, (4, 8)])
def test_experts_are_separate_layers(name, slices):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 12, 20, generator=generator) * torch.tensor([0.1, 1, 10, 100])[:, None, None]
    weight.requires_grad_()
    x = torch.randn(21, 20, generator=generator, requires_grad=True)
    gain = torch.rand(20, generator=generator).add(0.5).requires_grad_()
    dy, counts, plan = torch.randn(21, 12, generator=generator), [6, 0, 14, 1], TernaryPlan(name, name)
    ys = ternary_experts_linear(x, weight, torch.tensor(counts), TernaryCache(), slices=slices, gain=gain, plan=plan)
    parts = [
        torch.cat(run(part, w, plan, slices=slices, gain=gain), 1) for part, w in zip(x.split(counts), weight.unbind())
    ]
    assert torch.equal(torch.cat(ys, 1), torch.cat(parts))
    got = torch.autograd.grad(torch.cat(ys, 1), (x, weight, gain), dy)
    want = torch.autograd.grad(torch.cat(parts), (x, weight, gain), dy)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2], want[2])
    assert torch.equal(got[1][1], torch.zeros(12, 20))


def test_experts_in_double():
    weight, x = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    (y,) = ternary_experts_linear(x, weight, [2, 3], TernaryCache())
    for part, w, got in zip(x.split([2, 3]), weight, y.split([2, 3])):
        xq, wq = published(part, w)
        torch.testing.assert_close(got, xq @ wq.T)


def test_experts_counts_must_fit():
    with pytest.raises(ConfigError, match="2 experts and 5 tokens"):
        ternary_experts_linear(torch.randn(5, 6), torch.randn(2, 4, 6), [2, 2], TernaryCache())


def test_fake_quantised_experts_have_their_own_scales():
    weight = torch.randn(3, 4, 6, requires_grad=True)
    value = ternary_fake_quant(weight, (1, 3))
    for w, v in zip(weight.detach(), value):
        torch.testing.assert_close(v, torch.cat([ternary_fake_quant(w[:1]), ternary_fake_quant(w[1:])]))
        assert len(v[1:].abs().unique()) <= 2
    (grad,) = torch.autograd.grad(value.square().sum(), weight)
    torch.testing.assert_close(grad, 2 * value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations(dtype):
    x, weight, _ = sample(8, 16, 4)
    (y,) = run(x.to(dtype), weight, None)
    assert y.dtype == dtype
    assert torch.equal(y, run(x.to(dtype).float(), weight, None)[0].to(dtype))


def test_autocast_does_not_reach_the_integers():
    x, weight, _ = sample(8, 16, 4)
    plan = TernaryPlan("fp32", "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = run(x, weight, plan)
    assert torch.equal(y, run(x, weight, plan)[0])


def test_wrong_width():
    with pytest.raises(ConfigError, match=r"expected 16 input features, got a tensor \(8, 12\)"):
        run(torch.randn(8, 12), torch.randn(4, 16), None)


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'cpu_int8'"):
        TernaryPlan("cpu_int", "fp32")
    with pytest.raises(ConfigError, match="did you mean 'int8_hilo'"):
        TernaryPlan("fp32", "fp32", "int8_hi")


def test_backend_of_another_device():
    with pytest.raises(HardwareError, match="'cuda_int_mm' can't serve cpu"):
        run(torch.randn(2, 4), torch.randn(4, 4), TernaryPlan("cuda_int_mm", "fp32"))
