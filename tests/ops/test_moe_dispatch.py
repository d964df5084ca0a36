"""Routing and expert products against sums over all experts, with every back-end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tbf.errors import ConfigError
from tbf.ops import moe_dispatch
from tbf.ops.moe_dispatch import (
    BACKENDS,
    choose_backend,
    choose_experts,
    combine,
    count_experts,
    dispatch,
    expert_linear,
    route,
)

AVAILABLE = [b for b in BACKENDS if b != "grouped" or hasattr(torch.nn.functional, "grouped_mm")]
CPU = torch.device("cpu")


def problem(tokens=40, experts=4, top_k=2, width=8, inner=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    probs = torch.randn(tokens, experts, generator=generator).mul(2).softmax(-1)
    return x, probs, torch.randn(experts, inner, width, generator=generator), top_k


def mixed(x, probs, weight, top_k, backend):
    routing = route(probs, choose_experts(probs, top_k))
    return combine(expert_linear(dispatch(x, routing), weight, routing.counts, backend), routing)


def all_experts(x, probs, weight, top_k):
    """Every expert on every token, then a sum over the best."""
    best = probs.topk(top_k, dim=1)
    gates = best.values / best.values.sum(1, keepdim=True) if top_k > 1 else best.values
    gates = torch.zeros_like(probs).scatter(1, best.indices, gates)
    return torch.einsum("nd,efd,ne->nf", x, weight, gates)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_the_sum_over_all_experts(backend, top_k):
    x, probs, weight, _ = problem(top_k=top_k)
    leaves = [t.requires_grad_() for t in (x, probs, weight)]
    y, expected = mixed(*leaves, top_k, backend), all_experts(*leaves, top_k)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 20), experts=st.integers(1, 6), data=st.data())
def test_any_shape_drops_nothing(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    x, probs, weight, _ = problem(tokens, experts, top_k, width=3, inner=5)
    torch.testing.assert_close(mixed(x, probs, weight, top_k, None), all_experts(x, probs, weight, top_k))
    assert route(probs, choose_experts(probs, top_k)).counts.sum() == tokens * top_k


@pytest.mark.parametrize("backend", AVAILABLE)
def test_idle_experts_get_zero_gradients(backend):
    x, probs, weight, _ = problem(top_k=1)
    probs = torch.tensor([0.1, 0.7, 0.1, 0.1]).expand_as(probs)
    weight.requires_grad_()
    mixed(x, probs, weight, 1, backend).sum().backward()
    idle = torch.tensor([True, False, True, True])
    assert torch.all(weight.grad[idle] == 0)
    assert torch.all(weight.grad[1] != 0)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_expanded_upstream_gradients(backend):
    x, _, weight, _ = problem(tokens=8)
    weight.requires_grad_()
    expert_linear(x, weight, torch.tensor([3, 0, 4, 1]), backend).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_bias_steers_the_choice_but_not_the_gate():
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    routing = route(probs, choose_experts(probs, 2, torch.tensor([0.0, -0.2, 0.0])))
    assert routing.experts.tolist() == [[0, 2]]
    torch.testing.assert_close(routing.gates, torch.tensor([[0.5, 0.2]]) / 0.7)


def test_a_single_expert_is_weighed_by_its_probability():
    probs = torch.tensor([[0.25, 0.75]], requires_grad=True)
    gates = route(probs, choose_experts(probs, 1)).gates
    assert gates.item() == 0.75
    gates.sum().backward()
    assert probs.grad.tolist() == [[0.0, 1.0]]


def test_counts_skip_padding():
    experts = torch.tensor([[0, 2], [2, 1], [0, 1]])
    assert count_experts(experts, 4).tolist() == [2, 2, 2, 0]
    assert count_experts(experts, 4, torch.tensor([True, True, False])).tolist() == [1, 1, 2, 0]


def test_rows_are_sorted_by_expert_and_found_again():
    x, probs, _, top_k = problem()
    routing = route(probs, choose_experts(probs, top_k))
    assert torch.equal(routing.experts.flatten()[routing.order].sort().values, routing.experts.flatten()[routing.order])
    assert torch.equal(dispatch(x, routing)[routing.inverse], x.repeat_interleave(top_k, 0))


def test_gradients():
    x, probs, weight, _ = (t.double() if isinstance(t, torch.Tensor) else t for t in problem(6, 3, 2, 2, 2))
    leaves = [t.requires_grad_() for t in (x, probs, weight)]
    assert torch.autograd.gradcheck(lambda *t: mixed(*t, 2, None), leaves)


def test_a_trial_inside_a_checkpointed_region():
    """The recomputation finds the choice already made; what it saves must match all the same."""
    x, probs, weight, top_k = problem()
    x.requires_grad_()
    choose_backend.cache_clear()
    checkpoint(mixed, x, probs, weight, top_k, None, use_reentrant=False).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("fault", ["raises", "wrong", "absent"])
def test_a_faulty_grouped_kernel_is_not_chosen(fault, monkeypatch):
    def raises(*args, **kwargs):
        raise RuntimeError("needs compute capability 8.0")

    def wrong(x, weight, offs):
        return x @ weight[0]

    if fault == "absent":
        monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    else:
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", {"raises": raises, "wrong": wrong}[fault], raising=False)
    choose_backend.cache_clear()
    assert choose_backend(CPU, torch.float32) == "split"
    choose_backend.cache_clear()


def test_widths_that_the_grouped_kernel_refuses(monkeypatch):
    monkeypatch.setattr(moe_dispatch, "choose_backend", lambda device, dtype: "grouped")
    x, probs, weight, top_k = problem(width=6, inner=5)
    torch.testing.assert_close(mixed(x, probs, weight, top_k, None), all_experts(x, probs, weight, top_k))


def test_refuses():
    x, probs, weight, _ = problem()
    with pytest.raises(ConfigError, match="top_k_experts is 5"):
        choose_experts(probs, 5)
    with pytest.raises(ConfigError, match=r"'fast'.*grouped"):
        expert_linear(x, weight, torch.tensor([40, 0, 0, 0]), "fast")
