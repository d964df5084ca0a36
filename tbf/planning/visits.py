"""What one visit of each kind of layer allocates and computes: the real modules on fake tensors.

A deep model visits few kinds of layers many times, and a visit doesn't depend on where it stands. So each kind is
traced once, and `activations` plays the visits in the order of the model: seconds instead of minutes.

Shapes: `B` batch, `T` tokens, `D` hidden, `M` masked slots per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from tbf.model.bitlinear import BitLinear, set_ternary_plan
from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.flops import build_meta
from tbf.model.heads import gather_positions, masked_lm_loss, pool
from tbf.model.moe import ExpertLinear, MixtureOfExperts
from tbf.model.segment_info import SegmentInfo
from tbf.ops.moe_dispatch import Routing
from tbf.ops.ternary_backends import TernaryPlan
from tbf.ops.ternary_cache import TernaryCache
from tbf.planning.stand_ins import stand_in_plan, tensor_bytes
from tbf.planning.trace import Trace, Work


@dataclass(frozen=True)
class Shape:
    """The largest batch of a run."""

    rows: int
    tokens: int
    slots: int


@dataclass(frozen=True)
class Visit:
    """Bytes above the moment before the visit, when its input already lies in memory."""

    kept: int
    """After the forward pass: what the backward needs, and the output."""
    output: int
    forward_peak: int
    backward_peak: int
    """With the gradient of the output and what the forward kept, each weight's gradient freed when complete."""
    backward_peak_waiting: int
    """The same with the gradients of the weights held until the end of the visit."""
    backward_peak_adding: int
    """The same with each of them added to one that another visit left."""
    handing_peak: int
    """The most when a weight's gradient goes to the engine, without it."""
    gradients: int
    """Bytes of the gradients of the weights."""
    held: int
    """What the trainer holds until the backward pass is over."""
    forward_work: Work
    backward_work: Work
    """With the recomputation of a checkpointed visit."""


@dataclass(frozen=True)
class Pieces:
    """The visits that a model is made of, for one shape of batch."""

    batch: int
    """Bytes of the batch and of what is worked out of its segments once per forward."""
    embeddings: Visit
    loop_start: Visit
    layers: dict[tuple[str, int], Visit]
    """By (mixer, window)."""
    head: Visit
    """Final norm, prediction and loss."""
    ternary_caches: int
    """Bytes of all weights' ternary forms."""
    ternary_weights: int
    """How many weights they hold; made anew after each optimizer step."""
    table_gradient: int
    """The head's gradient of the embedding table, which waits for the embeddings' own."""


class PieceTracer:
    """Traces each shape of each model once."""

    def __init__(self, on_cuda: bool, say: Callable[[str], None] = lambda text: None) -> None:
        self._on_cuda, self._say = on_cuda, say
        self._traced: dict[tuple, Pieces] = {}

    def pieces(self, config: UltraConfig, shape: Shape, plan: TernaryPlan, *, checkpointed: bool) -> Pieces:
        key = (config, shape, plan, checkpointed)
        if key not in self._traced:
            kind = "recomputed" if checkpointed else "kept"
            self._say(f"tracing {shape.rows} rows of {shape.tokens} tokens, activations {kind}")
            self._traced[key] = trace_pieces(config, shape, plan, checkpointed=checkpointed, on_cuda=self._on_cuda)
        return self._traced[key]


def trace_pieces(config: UltraConfig, shape: Shape, plan: TernaryPlan, *, checkpointed: bool, on_cuda: bool) -> Pieces:
    """Traces every kind of visit on a device that computes by `plan`. Raises what torch does where a model can't be
    traced."""
    with FakeTensorMode(), Trace() as trace:
        model = _fake_model(config, trace, plan, on_cuda)
        start = trace.now
        with torch.no_grad():
            ternary = _fill_caches(model)
        caches, start = trace.now - start, trace.now

        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64)  # [B, T]
        slots = torch.zeros(shape.rows, shape.slots, dtype=torch.int64)  # [B, M]
        segments, labels = torch.ones_like(ids), slots.clone()
        info = SegmentInfo.build(config, segments)
        batch = trace.now - start
        x = torch.empty(shape.rows, shape.tokens, config.hidden_size).requires_grad_()  # [B, T, D]

        embeddings = _visit(trace, lambda: ((model.embeddings(ids, segments),), ()))
        loop_start = _visit(trace, lambda: ((model.loop_start(x, x, 1),), ()))
        layers: dict[tuple[str, int], Visit] = {}
        for kind, layer in zip(config.layer_types, model.layers):
            if kind not in layers:
                layers[kind] = _visit(trace, lambda layer=layer: (_run(layer, x, info, config, checkpointed), ()))
                x.grad = None
        head = _visit(trace, lambda: _predict(model, x, segments, slots, labels))
    table = 4 * model.embeddings.table.weight.numel()
    return Pieces(batch, embeddings, loop_start, layers, head, caches, ternary, table)


def _fake_model(config: UltraConfig, trace: Trace, plan: TernaryPlan, on_cuda: bool) -> TormentedBertFrankenstein:
    """The model with fake parameters, kernels that only allocate, and gradients that are freed when complete."""
    model = build_meta(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), name in module.state_dict())
        if hasattr(module, "ternary_cache"):
            module.ternary_cache = _UncheckedCache()
        if isinstance(module, MixtureOfExperts):
            module.host_counts = partial(_even_counts, module.num_experts)
    native = "fp32" not in (plan.forward, plan.backward) or not on_cuda
    set_ternary_plan(model, stand_in_plan(plan, on_cuda, trace.report, native))
    trace.watch_gradients(model.parameters())
    return model


class _UncheckedCache(TernaryCache):
    """Fake weights hold no values that TBF_CHECK_CACHE could compare."""

    def _check(self, prepare: Callable) -> None:
        pass


def _even_counts(experts: int, routing: Routing) -> list[int]:
    """A fake tensor holds no counts to read: every expert gets its share."""
    rows = len(routing.order)
    return [rows // experts + (i < rows % experts) for i in range(experts)]


def _fill_caches(model: nn.Module) -> int:
    """Ternarises every weight by sending one token through its module: in training that happens once per step.
    Returns how many there are."""
    count = 0
    for module in model.modules():
        if isinstance(module, BitLinear) and module.ternary:
            module(torch.empty(1, module.in_features))
            count += module.weight.numel()
        elif isinstance(module, ExpertLinear) and module.in_integers:
            experts, _, features = module.weight.shape
            module(torch.empty(experts, features), [1] * experts)
            count += module.weight.numel()
    return count


def _run(layer: nn.Module, x: Tensor, info: SegmentInfo, config: UltraConfig, checkpointed: bool) -> tuple[Tensor, ...]:
    """The layer's output and those of its statistics that the loss contains."""
    if checkpointed:
        y, stats = checkpoint(layer, x, info, 0, [], use_reentrant=False, preserve_rng_state=config.dropout > 0)
    else:
        y, stats = layer(x, info, 0)
    return (y, *(stats[name] for name in ("balance", "z"))) if stats else (y,)


def _predict(
    model: TormentedBertFrankenstein, x: Tensor, segments: Tensor, positions: Tensor, labels: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The end of the model's forward: the loss, and what the trainer holds beside it while going backward."""
    hidden = model.final_norm(x)
    pooled = pool(hidden, segments > 0, model.config.pooling)
    logits = model.predict(gather_positions(hidden, positions))  # [B, M, V]
    loss, correct = masked_lm_loss(logits, labels, torch.ones(()))
    return (loss,), (hidden, pooled, logits, correct)


def _visit(trace: Trace, call: Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> Visit:
    """Traces a call that returns (what the rest of the model differentiates, what else it holds)."""
    start = trace.now
    trace.reset_peaks()
    trace.take_work()
    outputs, held = call()
    kept, forward_peak, forward_work = trace.now - start, trace.peak - start, trace.take_work()
    output = tensor_bytes(outputs)
    gradient = _Gradient.apply(*outputs)
    del outputs  # the next visit has freed it by now
    trace.reset_peaks()
    gradient.backward()
    return Visit(
        kept, output, forward_peak, trace.peak - start, trace.peak_waiting - start, trace.peak_adding - start,
        trace.peak_handing - start, trace.waiting, tensor_bytes(held), forward_work, trace.take_work(),
    )  # fmt: skip


class _Gradient(torch.autograd.Function):
    """Stands for the rest of the model: its backward allocates the gradients of what it was given."""

    @staticmethod
    def forward(ctx: FunctionCtx, *outputs: Tensor) -> Tensor:
        ctx.shapes = [output.shape for output in outputs]
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: FunctionCtx, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape) for shape in ctx.shapes)
