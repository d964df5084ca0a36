"""Is a backend exact on this device, and how long does it take? The measurements behind the probe and `tbf bench gemm`.

Shapes: `M` tokens, `D` input features, `N` output features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tbf.ops.ternary_backends import (
    BACKENDS,
    Backend,
    TernaryPlan,
    TernaryWeight,
    fastest_tools,
    get_backend,
    prepare_weight,
)
from tbf.ops.ternary_reference import Quantised, ReferenceTools

STAGES = ("forward", "backward")
AWKWARD_SHAPES = ((32, 64, 48), (37, 20, 50), (5, 3, 1))  # (tokens, in, out)
SECONDS_PER_SHAPE = 0.3  # of rounds at one stage; the first three always run
MOST_ROUNDS = 8


def why_missing(name: str, device: torch.device) -> str | None:
    """Why a backend can't serve `device`, or None."""
    return BACKENDS[name](fastest_tools(device.type)).missing(device)


def why_inexact(
    backend: Backend, stage: str, device: torch.device, shapes: Sequence[tuple[int, int, int]]
) -> str | None:
    """Why `backend` isn't exact at a stage and shapes (M, D, N), or None: every bit is compared with FP64 products.

    On CUDA everything runs twice, since a kernel's error may show only the second time.
    """
    if backend.name == "fp32" and stage == "backward":
        return None  # its gradients aren't rounded
    generator = torch.Generator().manual_seed(0)
    reference = FP64Products(ReferenceTools())
    try:
        for m, d, n in shapes:
            x, weight, dy = _sample(m, d, n, device, generator)
            x[0], dy[0], dy[:, 0] = 1.0, 1.0, 1.0  # the largest sums, where a routine may saturate
            mine = prepare_weight(weight, [n], TernaryPlan(backend.name, backend.name))
            theirs = prepare_weight(weight, [n], TernaryPlan("fp32", "fp32"))
            q, _ = backend.tools.quantise_rows(x)
            for low in (False, True):

                def results(by: Backend, operands: TernaryWeight, low: bool = low) -> list[Tensor]:
                    if stage == "forward":
                        return [by.forward(q, operands.forward[0], operands.scales[0], n, d)]  # noqa: B023
                    return list(by.backward([dy], q, operands, low=low, need_x=True, need_w=True))  # noqa: B023

                expected = results(reference, theirs)
                for _ in range(2 if device.type == "cuda" else 1):
                    if not all(map(torch.equal, results(backend, mine), expected)):
                        return f"not exact at {m}x{d}x{n}"
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    return None


class FP64Products(Backend):
    """The reference of the exactness check: eager quantisers and FP64 products, which hold every integer here."""

    name = "fp64"

    def forward(self, x: Quantised, operand: Tensor, scale: Tensor, out_features: int, in_features: int) -> Tensor:
        products = x.high[:, :in_features].double() @ operand.double().T
        return self.tools.scale_products(products.to(torch.int32), None, x.scale, scale)

    def backward(self, dys, x, weight, *, low, need_x, need_w):
        rows, columns = self.tools.quantise_gradient(dys, weight.scales, x.scale, low=low, rows=True, columns=True)
        dx = self._product(rows, rows.high, rows.low, weight.backward)
        low_t = None if columns.low is None else columns.low.T
        return dx, self._product(columns, columns.high.T, low_t, x.high[:, : weight.in_features])

    def _product(self, q: Quantised, high: Tensor, low: Tensor | None, right: Tensor) -> Tensor:
        parts = [None if part is None else (part.double() @ right.double()).to(torch.int32) for part in (high, low)]
        return self.tools.scale_products(*parts, q.scale, torch.ones((), device=q.scale.device))


def time_backends(
    stage: str, names: Sequence[str], device: torch.device, shape: tuple[int, int, int], mode: str
) -> list[float]:
    """Milliseconds of each backend at one shape (M, D, N), quantisation included: the best of interleaved rounds,
    since other programs can only slow a round down."""
    x, weight, dy = _sample(*shape, device, torch.Generator().manual_seed(0))
    calls = [_call(stage, name, x, weight, dy, device, mode) for name in names]
    times: list[list[float]] = [[] for _ in names]
    started = time.perf_counter()
    for round_ in range(MOST_ROUNDS):
        if round_ > 2 and time.perf_counter() - started > SECONDS_PER_SHAPE:
            break
        for call, mine in zip(calls, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_ > 0:  # the first round warms up
                mine.append(time.perf_counter() - start)
    return [1e3 * min(mine) for mine in times]


def _call(
    stage: str, name: str, x: Tensor, weight: Tensor, dy: Tensor, device: torch.device, mode: str
) -> Callable[[], object]:
    backend = get_backend(name, device.type)
    prepared = prepare_weight(weight, [len(weight)], TernaryPlan(name, name))
    q, _ = backend.tools.quantise_rows(x)

    def forward() -> Tensor:
        rows, _ = backend.tools.quantise_rows(x)
        return backend.forward(rows, prepared.forward[0], prepared.scales[0], *weight.shape)

    def backward() -> tuple[Tensor | None, Tensor | None]:
        low = mode == "int8_hilo"
        return backend.backward([dy], q, prepared, low=low, need_x=True, need_w=mode != "int8_dx")

    return forward if stage == "forward" else backward


def _sample(m: int, d: int, n: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, D], weight [N, D] and dY [M, N]."""
    return tuple(torch.randn(*shape, generator=generator).to(device) for shape in ((m, d), (n, d), (m, n)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
