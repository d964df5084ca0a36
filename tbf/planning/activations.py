"""Plays the visits of a model in order, forward and backward, and finds the moment that needs the most memory.

Beside what the layers keep for the backward, a looped model holds gradients: autograd hands a weight's gradient to the
engine only when every visit has added to it. So from the last loop down to the first, the whole gradient of the looped
layers waits on the device (4 bytes per parameter), under every ZeRO stage.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass, field, replace

from tbf.model.config import UltraConfig
from tbf.ops.ternary_backends import TernaryPlan
from tbf.planning.engine_state import Reduction
from tbf.planning.estimate import estimate_pieces
from tbf.planning.trace import Work
from tbf.planning.visits import Pieces, PieceTracer, Shape, Visit

log = logging.getLogger(__name__)
_NOTHING = Reduction()


@dataclass(frozen=True)
class Activations:
    """Memory and work of one micro-batch, apart from the engine's own state. Bytes, on the device unless said."""

    peak: int
    peak_at: str
    kept: int
    """At the end of the forward pass, for the backward."""
    waiting_gradients: int
    """Of `peak`: weights' gradients that other visits will still add to."""
    handed: int
    """Of `peak`: what the engine needs while gradients are handed to it."""
    logits: int
    host: int
    """Kept in host memory (`cpu_checkpointing`)."""
    ternary_caches: int
    ternary_weights: int
    """How many are made ternary in each optimizer step."""
    forward: Work = field(repr=False)
    backward: Work = field(repr=False)
    """With recomputation."""
    source: str = "traced"

    @property
    def own(self) -> int:
        """Of `peak`: what is neither gradients nor the engine's."""
        return self.peak - self.waiting_gradients - self.handed


def activations(
    tracer: PieceTracer,
    config: UltraConfig,
    shape: Shape,
    plan: TernaryPlan,
    granularity: str,
    *,
    loops: int,
    host_offload: bool = False,
    gradients_stay: bool = False,
    reduction: Reduction = _NOTHING,
) -> Activations:
    """Traces and replays; falls back to an estimate, saying why, where this torch can't trace the model."""
    options = {"loops": loops, "host_offload": host_offload, "gradients_stay": gradients_stay, "reduction": reduction}
    try:
        pieces = tracer.pieces(config, shape, plan, checkpointed=granularity != "none")
    except Exception as error:  # what a private part of torch raises is not ours to know
        _explain(type(error).__name__, str(error).partition("\n")[0])
        pieces = estimate_pieces(config, shape, checkpointed=granularity != "none")
        return replace(replay(config, pieces, granularity, **options), source="estimated")
    return replay(config, pieces, granularity, **options)


@functools.cache
def _explain(kind: str, reason: str) -> None:
    log.warning("planning: this torch can't trace the model (%s: %s); activations are estimated instead", kind, reason)


def replay(
    config: UltraConfig,
    pieces: Pieces,
    granularity: str,
    *,
    loops: int,
    host_offload: bool = False,
    gradients_stay: bool = False,
    reduction: Reduction = _NOTHING,
) -> Activations:
    """The course of one forward and backward pass over `loops` loops under a checkpointing granularity.

    `pieces` must have been traced with checkpointed layers unless the granularity is `none`. `gradients_stay`: the
    engine keeps complete gradients on the device until the pass is over (ZeRO-1). `reduction`: what it needs for those
    that it takes.
    """
    course = _Course(config, pieces, granularity, loops, host_offload, gradients_stay, reduction)
    course.forward()
    kept = course.now + pieces.head.kept
    course.backward()
    return Activations(
        course.peak, course.peak_at, kept, course.waiting_at_peak, course.handed_at_peak, _logits(pieces), course.host,
        pieces.ternary_caches, pieces.ternary_weights, course.forward_work, course.backward_work,
    )  # fmt: skip


class _Course:
    """The level of memory along a pass: bytes held `now`, and the highest that they ever were."""

    def __init__(
        self,
        config: UltraConfig,
        pieces: Pieces,
        granularity: str,
        loops: int,
        on_host: bool,
        gradients_stay: bool,
        reduction: Reduction,
    ) -> None:
        self.pieces, self.granularity, self.loops = pieces, granularity, loops
        self.on_host, self.gradients_stay = on_host, gradients_stay
        self.reduction, self.complete = reduction, 0
        self.layers = [
            (f"layer {i} ({mixer})", pieces.layers[mixer, window])
            for i, (mixer, window) in enumerate(config.layer_types)
        ]
        self.state = pieces.loop_start.output  # bytes of one hidden state
        self.now, self.waiting, self.host = pieces.batch, 0, 0
        self.peak, self.peak_at, self.waiting_at_peak, self.handed_at_peak = 0, "", 0, 0
        self.forward_work: Work = Counter()
        self.backward_work: Work = Counter()

    def reach(self, above: int, where: str, reducing: int = 0) -> None:
        handed = min(self.complete, self.reduction.fills) + reducing
        if self.now + above + handed > self.peak:
            self.peak, self.peak_at = self.now + above + handed, where
            self.waiting_at_peak, self.handed_at_peak = self.waiting, handed

    def wait(self, gradients: int) -> None:
        self.now += gradients
        self.waiting += gradients

    def hand_over(self, visit: Visit, beside: int, where: str) -> None:
        """The visit completes its gradients. Each that goes to the bucket stops waiting, so the sum of both stays."""
        before, self.complete = self.complete, self.complete + visit.gradients
        if self.complete > self.reduction.bucket:
            after, self.complete = self.complete, before
            collected = max(0, self.reduction.collected - before)  # of this visit
            self.reach(beside + visit.handing_peak - collected, where, self.reduction.moment)
            self.complete = after

    def forward(self) -> None:
        pieces, start = self.pieces, self.pieces.loop_start
        self.reach(pieces.embeddings.forward_peak, "forward, embeddings")
        self.now += pieces.embeddings.kept
        self.forward_work += pieces.embeddings.forward_work
        for loop in range(self.loops):
            self.forward_work += start.forward_work
            if self.granularity == "none":
                self.reach(start.forward_peak, f"forward, start of loop {loop}")
                self.now += start.kept
            for i, (name, visit) in enumerate(self.layers):
                beside = start.kept if i == 0 and self.granularity != "none" else 0  # recomputed as one
                beside += self.state if i > 0 and self.granularity == "loop" else 0
                self.reach(beside + visit.forward_peak, f"forward, loop {loop}, {name}")
                self.forward_work += visit.forward_work
                if self.granularity != "loop":
                    self._keep(visit.kept, is_first=loop == i == 0)
            if self.granularity == "loop":
                self._keep(self.state, is_first=loop == 0)
        self.reach(pieces.head.forward_peak, "forward, head")
        self.forward_work += pieces.head.forward_work

    def _keep(self, kept: int, *, is_first: bool) -> None:
        """Holds what a recomputed region leaves; with `on_host`, the state that it began with leaves the device."""
        self.now += kept
        if self.on_host and not is_first:
            self.now -= self.state
            self.host += self.state

    def backward(self) -> None:
        pieces, start = self.pieces, self.pieces.loop_start
        self.reach(pieces.head.backward_peak, "backward, head")
        self.backward_work += pieces.head.backward_work
        self.now += pieces.head.held
        self.wait(pieces.table_gradient)
        self.now -= self.state if self.on_host else 0  # the last one, which never left
        for loop in reversed(range(self.loops)):
            if self.granularity == "loop":
                self._recompute(loop)
            for i, (name, visit) in reversed(list(enumerate(self.layers))):
                self._visit_backward(loop, i, name, visit)
            self.now -= start.kept
            self.reach(start.backward_peak, f"backward, start of loop {loop}")
            self.backward_work += start.backward_work
            if self.loops > 1 and loop == self.loops - 1:
                self.wait(self.state)  # the gradient of x0, which every loop adds to
        self.now -= pieces.embeddings.kept
        self.reach(pieces.embeddings.backward_peak_adding, "backward, embeddings")
        if not self.gradients_stay:
            self.hand_over(pieces.embeddings, 0, "backward, embeddings, reducing")
        self.backward_work += pieces.embeddings.backward_work

    def _recompute(self, loop: int) -> None:
        """Runs a loop again up to its last layer, whose own recomputation is part of its visit."""
        self.now -= 0 if self.on_host else self.state  # what the loop put out
        for i, (name, visit) in enumerate(self.layers[:-1]):
            beside = self.state + (self.pieces.loop_start.kept if i == 0 else 0)  # the gradient that came in
            self.reach(beside + visit.forward_peak, f"backward, loop {loop}, recomputing {name}")
            self.now += visit.kept
            self.backward_work += visit.forward_work
        self.now += self.layers[-1][1].kept  # taken off again at once: it is never made
        self.backward_work += self.pieces.loop_start.forward_work

    def _visit_backward(self, loop: int, i: int, name: str, visit: Visit) -> None:
        first, last = loop == self.loops - 1, loop == 0  # of the visits that add to a weight's gradient
        needed = visit.backward_peak if first else visit.backward_peak_adding
        needed = visit.backward_peak_waiting if first and not last else needed
        self.now -= visit.kept
        returned = 0
        if self.on_host and self.granularity == "layer":
            self.now += self.state  # it left the device when the next visit began
            returned = self.state
        if i == 0 and self.granularity != "none":
            self.now += self.pieces.loop_start.kept
        self.reach(needed + returned, f"backward, loop {loop}, {name}")
        if last and not self.gradients_stay:
            self.hand_over(visit, returned, f"backward, loop {loop}, {name}, reducing")
        self.wait(visit.gradients * (first - (last and not self.gradients_stay)))
        self.backward_work += visit.backward_work


def _logits(pieces: Pieces) -> int:
    return max((op.bytes for op in pieces.head.forward_work if op.name == "_log_softmax"), default=0) // 2
