"""Row 11: mixture of experts."""

import pytest
import torch
import torch.nn.functional as F

from tbf.model.moe import router_stats
from tbf.ops.moe_dispatch import BACKENDS, choose_experts, combine, dispatch, expert_linear, route
from tests.parity.conftest import absolute, random, relative

AVAILABLE = [b for b in BACKENDS if b != "grouped" or hasattr(F, "grouped_mm")]


@pytest.fixture(scope="module")
def mixtral():
    return pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed")


@pytest.fixture(scope="module")
def block(mixtral):
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = mixtral.MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) * 0.3)
    return module


def ours(x, router, up, down, backend):
    """The same block from our pieces: SwiGLU experts without SubLN."""
    probs = F.linear(x, router).softmax(-1)
    routing = route(probs, choose_experts(probs, 2))
    gate, inner = expert_linear(dispatch(x, routing), up, routing.counts, backend).chunk(2, -1)
    return combine(expert_linear(F.silu(gate) * inner, down, routing.counts, backend), routing)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_against_mixtral(measured, block, backend):
    weights = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    x, upstream = random(1, 90, 32, seed=9).requires_grad_(), random(1, 90, 32, seed=10)
    expected = block(x)
    got = ours(x[0], *weights, backend)[None]
    errors = [relative(got, expected)]
    for a, b in zip(*(torch.autograd.grad(y, [x, *weights], upstream) for y in (got, expected))):
        errors.append(relative(a, b))
    measured(11, f"experts, {backend}: values and gradients", "transformers Mixtral block", max(errors), 1e-5)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_against_all_experts_on_all_tokens(measured, backend):
    x, router = random(80, 16), random(5, 16, seed=1)
    up, down = random(5, 24, 16, seed=2), random(5, 16, 12, seed=3)
    best = F.linear(x, router).softmax(-1).topk(2)
    gates = torch.zeros(80, 5).scatter(1, best.indices, best.values / best.values.sum(1, keepdim=True))
    gate, inner = torch.einsum("nd,efd->enf", x, up).chunk(2, -1)
    expected = torch.einsum("enf,edf,ne->nd", F.silu(gate) * inner, down, gates)
    measured(
        11,
        f"experts, {backend}",
        "masked sum over all experts",
        relative(ours(x, router, up, down, backend), expected),
        1e-6,
    )


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_against_transformers(measured, mixtral, padded):
    logits = random(60, 4)
    real = torch.arange(60) < (41 if padded else 60)
    expected = mixtral.load_balancing_loss_func((logits,), 4, 2, real[None].long() if padded else None)
    probs = logits.softmax(-1)
    got = router_stats(logits, probs, choose_experts(probs, 2), real)["balance"] * 2
    measured(11, "balance loss x k", "transformers load_balancing_loss_func", absolute(got, expected), 1e-6)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_idle_experts(measured, backend):
    weights = [random(4, 16), random(4, 24, 16, seed=1), random(4, 16, 12, seed=2)]
    weights[0] = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(4, 16).clone()
    weights = [w.requires_grad_() for w in weights]
    ours(random(30, 16).abs(), *weights, backend).square().sum().backward()
    missing = sum(w.grad is None for w in weights)
    idle = max(w.grad[2:].abs().max().item() for w in weights[1:])
    measured(11, f"idle experts, {backend}", "zero gradient, never None", missing + idle, 0.0)
