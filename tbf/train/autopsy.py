"""Looks for where a bad step went wrong: runs its batches once more with every module watched."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_LARGEST = 8


def examine(engine: Any, batches: list[dict[str, torch.Tensor]], loops: int) -> dict[str, Any]:
    """Forward and backward over this rank's batches, without an update. Collective; spoils the engine's gradients.

    Returns plain values: `first_bad_module` (the first call, in running order, that made something non-finite out of
    finite input; None where all was finite), `largest_activations` (calls with the largest outputs, with ranges) and
    `gradient_norms` (of this rank, before averaging and clipping, by component).
    """
    calls: list[dict[str, Any]] = []
    squares: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    engine.train()
    with _watched(engine.module, calls, squares):
        for batch in batches:
            output = engine(**batch, num_loops=loops)
            engine.backward(output.loss)
    first = next((call for call in calls if not call["output"]["finite"] and _finite(call["input"])), None)
    calls.sort(key=lambda call: -max(abs(call["output"]["min"]), abs(call["output"]["max"])))
    return {
        "first_bad_module": first,
        "largest_activations": calls[:_LARGEST],
        "gradient_norms": {name: _plain(value.sqrt()) for name, value in sorted(squares.items())},
    }


@contextlib.contextmanager
def _watched(module: nn.Module, calls: list[dict[str, Any]], squares: dict[str, torch.Tensor]) -> Iterator[None]:
    def note_call(name: str, child: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        given = next((value for value in inputs if _is_float(value)), None)
        made = output if torch.is_tensor(output) else next((v for v in _values(output) if _is_float(v)), None)
        if _is_float(made):
            kind = type(child).__name__
            calls.append({"module": name, "class": kind, "input": _range(given), "output": _range(made)})

    def note_gradient(name: str, gradient: torch.Tensor) -> None:
        squares[component(name)] += gradient.detach().double().square().sum().cpu()

    hooks = [
        child.register_forward_hook(lambda child, given, output, name=name: note_call(name, child, given, output))
        for name, child in module.named_modules()
        if name
    ] + [
        parameter.register_hook(lambda gradient, name=name: note_gradient(name, gradient))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def component(name: str) -> str:
    """The part of the model that a parameter belongs to: "layers.3.mixer.q.weight" -> "layers.3.mixer"."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: number + 2 if number is not None else 1])


def _range(value: torch.Tensor | None) -> dict[str, Any] | None:
    if value is None or value.numel() == 0:
        return None
    value = value.detach()
    low, high = torch.aminmax(value)
    return {"min": _plain(low), "max": _plain(high), "finite": bool(torch.isfinite(value).all())}


def _finite(found: dict[str, Any] | None) -> bool:
    return found is None or found["finite"]


def _plain(value: torch.Tensor) -> float:
    return value.item()


def _values(output: Any) -> Iterator[Any]:
    yield from output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and value.numel() > 0


def strict(value: Any) -> Any:
    """The same tree with non-finite numbers as text, since JSON has none."""
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [strict(entry) for entry in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
