"""Mixture of experts without dropping: top-k routing, rows sorted by expert, one matrix product per expert.

Experts are stacked in one parameter, so that an expert without tokens gets a zero gradient rather than none at all:
ranks that route differently still agree on what there is to reduce.

Shapes: `N` tokens, `k` experts per token, `A` = N k assignments, `E` experts, `D` input width, `F` output width.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tbf.errors import ConfigError

BACKENDS = ("grouped", "split", "padded")
"""In order of preference. `grouped`: one kernel. `split`: a loop over experts. `padded`: one batched product, with each
expert filled up to the busiest. The last two wait for the device once, to learn the counts."""

logger = logging.getLogger(__name__)


class Routing(NamedTuple):
    """Where tokens go. Experts and gates are [N, k], best first; the rest describes rows sorted by expert."""

    experts: Tensor
    gates: Tensor
    order: Tensor
    """[A]: row a of the sorted ones is assignment order[a], which belongs to token order[a] // k."""
    inverse: Tensor
    """[A]: the sorted row of each assignment."""
    counts: Tensor
    """[E] int64 rows per expert."""


def choose_experts(probs: Tensor, top_k: int, bias: Tensor | None = None) -> Tensor:
    """The `top_k` experts [N, k] of each token by probs [N, E] + bias [E]; bias balances without a loss (2408.15664).

    Raises ConfigError when top_k is outside 1..E.
    """
    count = probs.shape[1]
    if not 1 <= top_k <= count:
        raise ConfigError(f"top_k_experts is {top_k}; it must lie in 1..{count}, the number of experts")
    return (probs.detach() if bias is None else probs.detach() + bias).topk(top_k, dim=1).indices


def route(probs: Tensor, experts: Tensor) -> Routing:
    """Weighs the chosen experts [N, k] of each token by probs [N, E] and sorts the assignments by expert.

    Gates are renormalised to sum to one, as in Mixtral (2401.04088); with top_k = 1 the gate is the probability itself
    (Switch, 2101.03961), since a constant gate would leave the router without a gradient.
    """
    gates = probs.gather(1, experts)
    if experts.shape[1] > 1:
        gates = gates / gates.sum(1, keepdim=True)
    flat = experts.flatten()  # [A]
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Routing(experts, gates, order, inverse, count_experts(experts, probs.shape[1]))


def count_experts(experts: Tensor, num_experts: int, real: Tensor | None = None) -> Tensor:
    """[E] int64: how often each expert appears in experts [N, k], over the tokens where real [N] is true."""
    hit = experts[..., None] == torch.arange(num_experts, device=experts.device)  # [N, k, E]
    return (hit if real is None else hit & real[:, None, None]).sum((0, 1))


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """x [N, D] -> [A, D], one row per assignment, sorted by expert."""
    return _Rows.apply(x, routing.order, routing.inverse, routing.gates.shape[1])


def combine(rows: Tensor, routing: Routing) -> Tensor:
    """rows [A, D], sorted by expert -> [N, D], the sum over each token's experts, weighed by its gates."""
    per_token = _Rows.apply(rows, routing.inverse, routing.order, 1).unflatten(0, routing.gates.shape)  # [N, k, D]
    return torch.einsum("nkd,nk->nd", per_token, routing.gates.to(rows.dtype))


class _Rows(torch.autograd.Function):
    """x[index // copies], where `inverse` is the inverse permutation of `index`.

    The backward gathers too. A scatter would add in an order of its own, and runs wouldn't repeat.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[index // copies if copies > 1 else index]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad[inverse]
        return (grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1)), None, None, None


def expert_linear(x: Tensor, weight: Tensor, counts: Tensor, backend: str | None = None) -> Tensor:
    """x [A, D], sorted by expert, with counts [E] rows each, times weight [E, F, D] -> [A, F].

    backend: one of BACKENDS; None: the first that this device computes exactly, found by a trial on first use.

    Raises ConfigError for an unknown back-end.
    """
    if backend is None:
        backend = choose_backend(x.device, x.dtype)
        if backend == "grouped" and not _grouped_takes(x, weight):
            backend = "split"
    if backend not in BACKENDS:
        raise ConfigError(f"expert back-end is '{backend}'; choose one of: {', '.join(BACKENDS)}")
    return {"grouped": _grouped, "split": _split, "padded": _padded}[backend](x, weight, counts)


@functools.cache
def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The first of BACKENDS that runs on `device` and agrees with a plain loop, forward and backward.

    Chosen by what works rather than by a clock, so that runs repeat bit by bit.
    """
    for backend in BACKENDS[:-1]:
        if _works(backend, device, dtype):
            logger.info("experts on %s in %s: back-end '%s'", device, dtype, backend)
            return backend
    return BACKENDS[-1]


def _works(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    counts = torch.tensor([3, 0, 5], device=device)
    x = torch.linspace(-1, 1, 8 * 16, device=device, dtype=dtype).view(8, 16).sin()
    weight = torch.linspace(-9, 9, 3 * 8 * 16, device=device, dtype=dtype).view(3, 8, 16).cos()

    def outcome(name: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = expert_linear(*leaves, counts, name)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    try:
        # Hooks of its own: those of a checkpointed region would record the trial, and the recomputation has none.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            pairs = list(zip(outcome(backend), outcome("split")))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        logger.info("experts on %s in %s: back-end '%s' doesn't run: %s", device, dtype, backend, error)
        return False
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)


def _grouped_takes(x: Tensor, weight: Tensor) -> bool:
    """The kernel wants rows of whole 16 bytes."""
    return all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])


def _grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _ContiguousGrad.apply(F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32)))


class _ContiguousGrad(torch.autograd.Function):
    """The identity. The grouped kernel's backward refuses expanded gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _split(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.cat([F.linear(rows, expert) for rows, expert in zip(x.split(counts.tolist()), weight.unbind(0))])


def _padded(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    places = torch.arange(int(counts.max()), device=x.device)
    filled = places < counts[:, None]  # [E, busiest]
    row = (counts.cumsum(0) - counts)[:, None] + places
    row = torch.where(filled, row, 0)
    batch = torch.where(filled[..., None], x[row], 0)  # [E, busiest, D]
    return torch.bmm(batch, weight.mT)[filled]
