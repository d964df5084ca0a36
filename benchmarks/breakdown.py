"""Where the time of a training step goes: torch's profiler, with every operation charged to a part of the model.

An operation of the backward is charged to the part whose forward made its node, found by autograd's sequence numbers;
recomputed forwards run inside the backward and name their parts themselves.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tbf.model.bitlinear import BitLinear
from tbf.ops.ternary_native import native_tools

PREFIX = "tbf::"
KERNELS = {
    "gemm": "ternary GEMM",
    "quantise_rows": "quantise activations",
    "quantise_gradient": "quantise gradients",
    "norm_backward": "SubLN backward",
    "pack_rows": "pack operands",
    "pack_columns": "pack operands",
    "ternarise": "ternarise weights",
}


def time_by_part(step: Callable[[], object], module: nn.Module, engine: Any) -> dict[str, float]:
    """Milliseconds of one call of `step` per part; the parts are disjoint and add up to the profiled time."""
    whole = record_function(f"{PREFIX}loop and engine")
    with _named_parts(module, engine), profile(activities=[ProfilerActivity.CPU]) as profiler, whole:
        step()
    events = [event for event in profiler.events() if event.device_type.name == "CPU"]
    forward_part = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::engine"):
            part = _enclosing(event)
            if part is not None and not _in_backward_node(event):
                forward_part.setdefault((event.thread, event.sequence_nr), part)
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        totals[_charge(event, forward_part)] += event.self_cpu_time_total / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _charge(event: Any, forward_part: dict[tuple[int, int], str]) -> str:
    """The innermost named part around the event, or the part that made the backward node it runs in."""
    node = event
    while node is not None:
        if node.name.startswith(PREFIX):
            return node.name[len(PREFIX) :]
        if node.name.startswith("autograd::engine") and node.sequence_nr >= 0:
            part = forward_part.get((node.fwd_thread, node.sequence_nr))
            if part is not None:
                return part
        node = node.cpu_parent
    return "loop and engine"


def _enclosing(event: Any) -> str | None:
    node = event
    while node is not None:
        if node.name.startswith(PREFIX):
            return node.name[len(PREFIX) :]
        node = node.cpu_parent
    return None


def _in_backward_node(event: Any) -> bool:
    """Whether the event is itself a node of the backward, whose number names the forward operation."""
    return event.name.endswith("Backward") or event.name.split("::")[-1].rstrip("0123456789").endswith("Backward")


@contextlib.contextmanager
def _named_parts(module: nn.Module, engine: Any) -> Iterator[None]:
    """Puts profiler ranges around modules, the compiled kernels and the optimizer while the block runs."""
    undo: list[Callable[[], None]] = []

    def around(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def named(*args: Any, **kwargs: Any) -> Any:
            with record_function(PREFIX + label):
                return original(*args, **kwargs)

        setattr(owner, name, named)
        undo.append(lambda: delattr(owner, name))

    for child in module.modules():
        label = _label(module, child)
        if label:
            around(child, "forward", label)
    tools = native_tools()
    if tools is not None:
        for method, label in KERNELS.items():
            around(tools, method, label)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    around(optimizer, "step", "optimizer")
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


def _label(module: Any, child: nn.Module) -> str | None:
    """How a module is called in the table; None: it belongs to the part around it."""
    if isinstance(child, BitLinear):
        return "BitLinear, rest"
    if child is module.head:
        return "head"
    if child is module.embeddings:
        return "embeddings"
    for layer in module.layers:
        if child is layer.mixer:
            return f"{type(child).__name__}, rest"
        if child is layer.ffn:
            return "FFN, rest"
        if child in (layer.mixer_norm, layer.ffn_norm):
            return "norms"
    return "loops, loss, pooling" if child is module else None
