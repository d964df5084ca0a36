"""The expert block: its arithmetic, what its router reports, and how it behaves under recomputation."""

import pytest
import torch
import torch.nn.functional as F

from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.moe import MixtureOfExperts, router_stats, update_router_biases
from tbf.model.segment_info import SegmentInfo
from tbf.ops.moe_dispatch import BACKENDS, choose_experts
from tbf.ops.ternary import activation_fake_quant, ternary_fake_quant

SEGMENTS = torch.tensor([[1] * 6 + [2] * 3, [1] * 5 + [0] * 4])


@pytest.fixture
def block(tiny):
    def build(**changes):
        config = tiny(use_moe=True, ffn_hidden_size=24, initializer_std=1.0, **changes)
        torch.manual_seed(0)
        moe = MixtureOfExperts(config)
        moe.init_parameters()
        torch.nn.init.uniform_(moe.down_proj.sub_norm, 0.5, 1.5)
        return moe, torch.randn(2, 9, 32), SegmentInfo.build(config, SEGMENTS)

    return build


def one_expert(moe, x, expert):
    """A single expert on x [N, D], written like a dense block with its own ternary scales."""
    ternary = moe.config.use_bitnet
    up, down = moe.up_proj.weight[expert], moe.down_proj.weight[expert]
    if ternary:
        slices = up.split(moe.up_proj.slices)
        up = torch.cat([ternary_fake_quant(w) for w in slices])
        x, down = activation_fake_quant(x), ternary_fake_quant(down)
    inner = x @ up.T
    if moe.gated:
        gate, inner = inner.chunk(2, -1)
        inner = F.silu(gate) * inner
    else:
        inner = F.relu(inner).square()
    inner = inner * (inner.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * moe.down_proj.sub_norm
    return (activation_fake_quant(inner) if ternary else inner) @ down.T


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("ternary", [False, True])
def test_is_the_gated_sum_of_its_experts(block, activation, ternary):
    moe, u, info = block(ffn_activation=activation, use_bitnet=ternary)
    with torch.no_grad():
        moe.up_proj.weight[1].mul_(5)  # a scale shared between experts would show
    x = u.flatten(0, 1)
    probs = (x @ moe.router.T).softmax(-1)
    best = probs.topk(2)
    gates = torch.zeros_like(probs).scatter(1, best.indices, best.values / best.values.sum(1, keepdim=True))
    expected = sum(gates[:, e, None] * one_expert(moe, x, e) for e in range(4))
    torch.testing.assert_close(moe(u, info)[0], expected.view_as(u), rtol=1e-4, atol=1e-4)


AVAILABLE = [b for b in BACKENDS if b != "grouped" or hasattr(F, "grouped_mm")]


@pytest.mark.parametrize("ternary", [False, True])
def test_all_back_ends_agree(block, ternary):
    moe, u, info = block(use_bitnet=ternary)
    outcomes = []
    for backend in AVAILABLE:
        moe.force_backend(backend)
        y, stats = moe(u, info)
        gradients = torch.autograd.grad(y.square().sum() + stats["balance"] + stats["z"], list(moe.parameters()))
        outcomes.append((y, *gradients))
    for other in outcomes[1:]:
        torch.testing.assert_close(outcomes[0], other, rtol=1e-5, atol=1e-5)


def test_integer_kernels_agree_with_fake_quantisation(block):
    moe, u, info = block(use_bitnet=True, ffn_activation="swiglu")
    outcomes = []
    for backend in (None, "split"):
        moe.force_backend(backend)
        y, _ = moe(u, info)
        outcomes.append((y, torch.autograd.grad(y.square().sum(), list(moe.parameters()))))
    (y, gradients), (expected, references) = outcomes
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, references):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_experts_are_quantised_once_until_a_step(block):
    moe, u, info = block(use_bitnet=True)
    for _ in range(3):
        moe(u, info)[0].sum().backward()
    assert moe.up_proj.ternary_cache.quantisations == moe.down_proj.ternary_cache.quantisations == 1
    torch.optim.SGD(moe.parameters(), lr=0.1).step()
    moe(u, info)
    assert moe.up_proj.ternary_cache.quantisations == moe.down_proj.ternary_cache.quantisations == 2


def test_every_parameter_gets_a_gradient_when_all_tokens_choose_one_expert(block):
    moe, u, info = block(top_k_experts=1)
    with torch.no_grad():
        moe.router.zero_()[2] = 1
    y, _ = moe(u.abs(), info)
    y.square().sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    assert [bool(g.any()) for g in moe.up_proj.weight.grad] == [False, False, True, False]


def test_statistics_ignore_padding(block):
    moe, u, info = block()
    stats = moe(u, info)[1]
    moved = torch.where(info.real[..., None], u, torch.randn_like(u))
    for key, value in moe(moved, info)[1].items():
        assert torch.equal(value, stats[key]), key
    assert stats["load"].sum() == 2 * info.real.sum()
    assert stats["dropped"] == 0


def test_balance_is_one_for_a_uniform_router_and_grows_with_collapse():
    logits = torch.zeros(8, 4)
    experts = torch.tensor([[0, 1], [2, 3]] * 4)
    real = torch.ones(8, dtype=torch.bool)
    even = router_stats(logits, logits.softmax(-1), experts, real)
    assert even["balance"].item() == pytest.approx(1.0)
    assert even["entropy"].item() == pytest.approx(torch.tensor(4.0).log().item())
    assert even["z"].item() == pytest.approx(torch.tensor(4.0).log().square().item())
    logits = torch.tensor([20.0, 20.0, 0, 0]).expand(8, 4)
    collapsed = router_stats(logits, logits.softmax(-1), torch.tensor([[0, 1]] * 8), real)
    assert collapsed["balance"].item() == pytest.approx(2.0)
    nothing = router_stats(logits, logits.softmax(-1), torch.tensor([[0, 1]] * 8), ~real)
    assert all(torch.all(value == 0) for value in nothing.values())


def test_balance_loss_moves_the_router_towards_idle_experts(block):
    moe, u, info = block()
    with torch.no_grad():
        moe.router.zero_()[0] = 0.5
    stats = moe(u.abs(), info)[1]
    (gradient,) = torch.autograd.grad(stats["balance"], moe.router)
    assert gradient[0].sum() > 0 > gradient[1:].sum()


def test_router_bias_moves_once_per_call_towards_the_mean(block):
    moe, u, info = block(router_aux_free=True, num_loops=2)
    moe.update_router_bias(torch.tensor([[9, 1, 5, 5], [0, 0, 0, 8]]))
    expected = torch.tensor([[-1.0, 1, 0, 0], [1, 1, 1, -1]]) * 1e-3
    torch.testing.assert_close(moe.router_bias, expected)
    with torch.no_grad():
        moe.router_bias[1, 3] = 9
    assert (moe(u, info, 1)[1]["load"][3] == info.real.sum()).item()
    assert torch.equal(moe(u, info, 7)[1]["load"], moe(u, info, 1)[1]["load"])
    assert "router_bias" in moe.state_dict()


def test_router_bias_is_optional(block):
    moe, _, _ = block()
    moe.update_router_bias(torch.ones(1, 4))
    assert moe.router_bias is None
    assert "router_bias" not in moe.state_dict()


@pytest.mark.parametrize("mode", ["layer", "loop"])
@pytest.mark.parametrize("backend", ["split", None])
def test_recomputation_routes_alike_and_counts_once(all_mixers, token_ids, mode, backend):
    torch.manual_seed(0)
    model = TormentedBertFrankenstein(all_mixers.replace(use_moe=True, router_aux_free=True, use_bitnet=True))
    ids = token_ids(2, 12)
    labels = torch.where(ids % 3 == 0, ids, -100)
    for layer in model.layers:
        layer.ffn.force_backend(backend)

    def outcome(mode):
        model.set_activation_checkpointing(mode)
        model.zero_grad()
        output = model(ids, labels=labels)
        output.loss.backward()
        return output, [p.grad for p in model.parameters()]

    plain, gradients = outcome("none")
    again, recomputed = outcome(mode)
    assert torch.equal(plain.loss, again.loss)
    assert all(torch.equal(plain.router[key], again.router[key]) for key in plain.router)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed))


@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_a_recomputation_remembers_its_experts(all_mixers, token_ids, mode, monkeypatch):
    torch.manual_seed(0)
    model = TormentedBertFrankenstein(all_mixers.replace(use_moe=True))
    ids = token_ids(2, 12)
    calls = []

    def choose(probs, top_k, bias=None):
        calls.append(top_k)
        return choose_experts(probs, top_k, bias)

    monkeypatch.setattr("tbf.model.moe.choose_experts", choose)
    model.set_activation_checkpointing(mode)
    loss = model(ids, labels=torch.where(ids % 3 == 0, ids, -100)).loss
    visits = model.config.num_loops * model.config.num_layers
    assert len(calls) == visits
    loss.backward()
    assert len(calls) == visits
    model(ids)
    assert len(calls) == 2 * visits  # another forward chooses anew


def test_biases_of_all_layers_follow_the_encoders_loads(all_mixers, token_ids):
    model = TormentedBertFrankenstein(all_mixers.replace(use_moe=True, router_aux_free=True))
    load = model(token_ids(1, 12)).router["load"]  # [L, layers, E]
    assert load.shape == (2, 6, 4)
    assert torch.all(load.sum(-1) == 24)
    update_router_biases(model, load)
    for index, layer in enumerate(model.layers):
        expected = -1e-3 * torch.sign(load[:, index] - 6)
        torch.testing.assert_close(layer.ffn.router_bias, expected)
