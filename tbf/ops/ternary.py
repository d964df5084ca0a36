"""Linear maps with ternary weights and int8 activations (BitNet b1.58, arXiv 2402.17764), int8 forward and backward.

Shapes: `B..` any leading dimensions, `M` tokens, `N` output features (summed over the slices of a fused projection),
`D` input features, `E` experts.

    y = int8(x) ternary(W)^T        one scale per token, one per slice of W (formulas: ternary_reference.py)

Gradients pass straight through both roundings: dX = dY Wq, dW = dY^T Xq, with the quantised operands. Only the int8
activations are saved for the backward, and the weight enters the graph without being saved (an engine may take it
away between forward and backward).

FP32 goes through the integer kernels of the plan in force. Other types, and meta tensors, take the plain route of
`ternary_fake_quant` and `activation_fake_quant`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tbf.errors import ConfigError
from tbf.ops.ternary_backends import TernaryPlan, TernaryWeight, prepare_weight
from tbf.ops.ternary_cache import TernaryCache
from tbf.ops.ternary_probe import default_plan
from tbf.ops.ternary_reference import Quantised, ReferenceTools

MAX_TOKENS = 131_072  # |sum| <= 128 * 127 * tokens must fit in an int32


def ternary_linear(
    x: Tensor,
    weight: Tensor,
    cache: TernaryCache,
    *,
    slices: Sequence[int] | None = None,
    gain: Tensor | None = None,
    norm_eps: float = 1e-5,
    plan: TernaryPlan | None = None,
) -> tuple[Tensor, ...]:
    """Maps x [B.., D] to one [B.., N_i] per slice of `weight` [N, D].

    `cache` belongs to this weight and keeps its ternary form until the next optimizer step. `gain` [D] puts
    RMSNorm(x) * gain before the quantisation (SubLN). `plan` defaults to the probed plan of the device. NaN or Inf in a
    token makes that token's outputs NaN.
    """
    slices = tuple(slices or (weight.shape[0],))
    if not uses_kernels(weight):
        if gain is not None:
            x = F.rms_norm(x, (x.shape[-1],), gain, norm_eps)
        return F.linear(activation_fake_quant(x), ternary_fake_quant(weight, slices)).split(slices, dim=-1)
    plan = plan or default_plan(weight.device)
    prepared = cache.get(weight, (slices, plan), lambda: [prepare_weight(weight, slices, plan)])
    rows = _as_rows(x, weight.shape[1])
    ys = _TernaryLinear.apply(rows, weight, gain, norm_eps, prepared, (len(rows),), plan)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype) for y in ys)


def ternary_experts_linear(
    x: Tensor,
    weight: Tensor,
    counts: Sequence[int] | Tensor,
    cache: TernaryCache,
    *,
    slices: Sequence[int] | None = None,
    gain: Tensor | None = None,
    norm_eps: float = 1e-5,
    plan: TernaryPlan | None = None,
) -> tuple[Tensor, ...]:
    """Sends x [M, D], its tokens sorted by expert, through stacked experts `weight` [E, N, D]: a y [M, N_i] per slice.

    `counts` [E] (sum M) says how many tokens each expert gets; host integers, or a tensor at the price of a transfer.
    None for an expert is fine and gives it a zero gradient rather than none. Every expert has its own ternary scales;
    the rest is as in `ternary_linear`. Raises ConfigError when the counts don't fit.
    """
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if len(counts) != len(weight) or sum(counts) != len(x):
        raise ConfigError(
            f"ternary experts: {len(weight)} experts and {len(x)} tokens, but {len(counts)} counts of {sum(counts)}"
        )
    slices = tuple(slices or (weight.shape[1],))
    if not uses_kernels(weight):
        if gain is not None:
            x = F.rms_norm(x, (x.shape[-1],), gain, norm_eps)
        values = ternary_fake_quant(weight, slices)
        parts = [F.linear(part, w) for part, w in zip(activation_fake_quant(x).split(counts), values)]
        return torch.cat(parts).split(slices, dim=-1)
    plan = plan or default_plan(weight.device)
    prepared = cache.get(weight, (slices, plan), lambda: [prepare_weight(w, slices, plan) for w in weight.unbind()])
    rows = _as_rows(x, weight.shape[2])
    return tuple(
        y.to(x.dtype) for y in _TernaryLinear.apply(rows, weight, gain, norm_eps, prepared, tuple(counts), plan)
    )


def ternary_inference(
    x: Tensor,
    matrices: list[TernaryWeight],
    counts: Sequence[int],
    *,
    gain: Tensor | None = None,
    norm_eps: float = 1e-5,
    plan: TernaryPlan,
) -> tuple[Tensor, ...]:
    """The forward of `ternary_experts_linear` alone, bit for bit, for matrices that have no FP32 weights.

    x [M, D] holds counts[e] rows for each of `matrices`. Raises ConfigError where a gradient would be expected of it.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError(
            "a packed ternary model has no weights to train and no gradients; call it under torch.no_grad(), "
            "or fine-tune an export in the format safetensors"
        )
    if len(counts) != len(matrices) or sum(counts) != len(x):
        raise ConfigError(
            f"packed ternary: {len(matrices)} matrices and {len(x)} tokens, but {len(counts)} counts of {sum(counts)}"
        )
    ys, _, _ = _multiply(_as_rows(x, matrices[0].in_features), gain, norm_eps, matrices, counts, plan)
    return tuple(y.to(x.dtype) for y in ys)


def ternary_fake_quant(weight: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Returns the ternary value of `weight`, in its dtype, with a straight-through gradient.

    `weight` is [N, D] or, for stacked experts, [E, N, D] (one scale per expert). `rows` cuts N into slices that each
    get a scale of their own, for fused projections. It is redone on every call: `ternary_linear` is much faster.
    """
    matrices = weight.detach().flatten(0, -3).unbind() if weight.ndim > 2 else [weight.detach()]
    values = [
        torch.cat([_ternary_value(w) for w in matrix.split(list(rows or matrix.shape[:1]))]) for matrix in matrices
    ]
    return _StraightThrough.apply(weight, torch.stack(values).view(weight.shape))


def activation_fake_quant(x: Tensor) -> Tensor:
    """Returns the int8 value of `x` [B.., D], in its dtype, with a straight-through gradient."""
    quantised, _ = ReferenceTools().quantise_rows(x.detach().reshape(-1, x.shape[-1]))
    value = quantised.high.to(x.dtype) * quantised.scale[:, None]
    return _StraightThrough.apply(x, value.view(x.shape))


def uses_kernels(weight: Tensor) -> bool:
    """Whether `weight` goes through the integer kernels."""
    return weight.dtype == torch.float32 and not weight.is_meta


class _TernaryLinear(torch.autograd.Function):
    """One or more matrices (experts), each with its share of the rows, each with one or more slices."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        norm_eps: float,
        matrices: list[TernaryWeight],
        counts: tuple[int, ...],
        plan: TernaryPlan,
    ) -> tuple[Tensor, ...]:
        ys, q, rrms = _multiply(x, gain, norm_eps, matrices, counts, plan)
        ctx.matrices, ctx.counts, ctx.plan, ctx.experts = matrices, counts, plan, weight.ndim == 3
        ctx.save_for_backward(q.high, q.scale, *(() if gain is None else (x, gain, rrms)))
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        high, scale, *norm = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1]
        dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
        dxs, dws = [], []
        shares = zip(_split(Quantised(high, scale), ctx.counts), zip(*[dy.split(ctx.counts) for dy in dys]))
        for w, (q, dy) in zip(ctx.matrices, shares):
            dx, dw = _gradients(dy, q, w, ctx.plan, need_x, need_w)
            dxs.append(dx)
            dws.append(dw)
        dx = (torch.cat(dxs) if len(dxs) > 1 else dxs[0]) if need_x else None
        dw = (torch.stack(dws) if ctx.experts else dws[0]) if need_w else None
        dgain = None
        if norm and need_x:
            x, gain, rrms = norm
            dx, dgain = ctx.plan.backend(ctx.plan.forward, x.device.type).tools.norm_backward(dx, x, gain, rrms)
        return dx, dw, dgain, None, None, None, None


def _multiply(
    x: Tensor,
    gain: Tensor | None,
    norm_eps: float,
    matrices: list[TernaryWeight],
    counts: Sequence[int],
    plan: TernaryPlan,
) -> tuple[tuple[Tensor, ...], Quantised, Tensor | None]:
    """Rows [M, D] through their matrices: (one y [M, N_i] per slice, the quantised rows, 1/rms [M] if normed)."""
    backend = plan.backend(plan.forward, x.device.type)
    slices, d = matrices[0].slices, matrices[0].in_features
    with torch.autocast(x.device.type, enabled=False):
        q, rrms = backend.tools.quantise_rows(x, gain, norm_eps)
        shares = list(zip(_split(q, counts), matrices))
        parts = [
            [backend.forward(share, w.forward[i], w.scales[i], n, d) for share, w in shares]
            for i, n in enumerate(slices)
        ]
    return tuple(torch.cat(part) if len(part) > 1 else part[0] for part in parts), q, rrms


def _gradients(
    dys: Sequence[Tensor], q: Quantised, weight: TernaryWeight, plan: TernaryPlan, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients of one matrix, in as many pieces as int32 sums over tokens allow."""
    if not len(q.high):
        device = q.high.device
        dx = torch.empty(0, weight.in_features, device=device) if need_x else None
        return dx, torch.zeros(sum(weight.slices), weight.in_features, device=device) if need_w else None
    pieces = []
    for first in range(0, len(q.high), MAX_TOKENS):
        part = slice(first, first + MAX_TOKENS)
        pieces.append(
            _piece([dy[part] for dy in dys], Quantised(q.high[part], q.scale[part]), weight, plan, need_x, need_w)
        )
    dxs, dws = zip(*pieces)
    return torch.cat(dxs) if need_x and len(dxs) > 1 else dxs[0], sum(dws[1:], dws[0]) if need_w else None


def _piece(
    dys: Sequence[Tensor], q: Quantised, weight: TernaryWeight, plan: TernaryPlan, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    fp32 = plan.backend("fp32", q.high.device.type)
    integer = plan.backend(plan.weight_backend, q.high.device.type)
    if plan.mode != "int8_dx" or integer is fp32:
        return integer.backward(dys, q, weight, low=plan.mode == "int8_hilo", need_x=need_x, need_w=need_w)
    dx, _ = integer.backward(dys, q, weight, low=False, need_x=need_x, need_w=False)
    _, dw = fp32.backward(dys, q, weight, low=False, need_x=False, need_w=need_w)
    return dx, dw


class _StraightThrough(torch.autograd.Function):
    """Gives `value` forward and the gradient to `x` backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _ternary_value(weight: Tensor) -> Tensor:
    values, scale = ReferenceTools().ternarise(weight)
    return values.to(weight.dtype) * scale


def _as_rows(x: Tensor, features: int) -> Tensor:
    """x as FP32 rows [M, D] whose features are neighbours in memory."""
    if x.shape[-1] != features:
        raise ConfigError(f"ternary linear: expected {features} input features, got a tensor {tuple(x.shape)}")
    rows = x.float().reshape(-1, features)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _split(q: Quantised, counts: Sequence[int]) -> list[Quantised]:
    if len(counts) == 1:
        return [q]
    totals = [None] * len(counts) if q.total is None else q.total.split(counts)
    return [Quantised(h, s, total=t) for h, s, t in zip(q.high.split(counts), q.scale.split(counts), totals)]
