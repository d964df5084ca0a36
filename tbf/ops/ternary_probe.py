"""Finds out which integer GEMM serves a device: exact first, then fast.

A backend is taken only if its results equal an FP64 reference bit for bit, at awkward shapes and at the model's own,
and if it is at least 1.15 times as fast as the FP32 products of the same integers, quantisation included. Forward and
backward are decided separately. The verdict is kept on disk; `TBF_KERNEL=backend[:mode]` overrides it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tbf.errors import ConfigError, HardwareError, nearest
from tbf.ops.ternary_backends import (
    BACKENDS,
    DEFAULT_MODE,
    GRADIENT_MODES,
    Backend,
    TernaryPlan,
    TernaryWeight,
    fastest_tools,
    get_backend,
    prepare_weight,
)
from tbf.ops.ternary_build import cache_folder, source_hash
from tbf.ops.ternary_reference import Quantised, ReferenceTools
from tbf.system import processor

MIN_SPEEDUP = 1.15
TOKENS = 256
SECONDS_PER_SHAPE = 0.3  # of rounds at one stage; the first three always run
COMMON_SHAPES = ((384, 384), (384, 1536), (1024, 1024))  # (in, out) when no model is known
AWKWARD_SHAPES = ((32, 64, 48), (37, 20, 50), (5, 3, 1))  # (tokens, in, out)
STAGES = ("forward", "backward")


@dataclass
class ProbeRow:
    """One backend at one stage: `reason` says why it can't serve, else `ms` is its time over all shapes."""

    stage: str
    backend: str
    reason: str | None
    ms: float


@dataclass
class ProbeReport:
    """What was tried on a device, and the plan that came of it."""

    device: str
    shapes: list[list[int]]
    mode: str
    rows: list[ProbeRow]

    @property
    def plan(self) -> TernaryPlan:
        """The fastest exact backend of each stage, or fp32 where none is clearly faster."""
        return TernaryPlan(self._best("forward"), self._best("backward"), self.mode)

    def _best(self, stage: str) -> str:
        times = {row.backend: row.ms for row in self.rows if row.stage == stage and row.reason is None}
        best = min(times, key=times.get)
        return best if times[best] * MIN_SPEEDUP <= times["fp32"] else "fp32"

    def table(self) -> str:
        """One line per backend and stage."""
        plan, lines = self.plan, [f"ternary kernels on {self.device}: {self.plan}"]
        for row in self.rows:
            base = next(r.ms for r in self.rows if r.stage == row.stage and r.backend == "fp32")
            chosen = "*" if row.backend == getattr(plan, row.stage) else " "
            verdict = row.reason or f"exact, {row.ms:8.2f} ms, {base / row.ms:5.2f}x FP32"
            lines.append(f"  {chosen} {row.stage:9}{row.backend:12} {verdict}")
        return "\n".join(lines)


def default_plan(device: torch.device) -> TernaryPlan:
    """The plan of a layer that was given none: TBF_KERNEL, or the probe at common shapes."""
    return _default_plan(device, os.environ.get("TBF_KERNEL", ""))


@functools.cache
def _default_plan(device: torch.device, setting: str) -> TernaryPlan:
    name, mode = _parse(setting, DEFAULT_MODE)
    return forced_plan(device, name, mode) if name else probe_ternary(device, mode=mode).plan


def choose_plan(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = COMMON_SHAPES,
    *,
    mode: str = DEFAULT_MODE,
    say: Callable[[str], None] | None = None,
) -> TernaryPlan:
    """The plan for a training run: all ranks of the process group call it and get the same one.

    `shapes` are the model's (in, out) pairs. `say` gets the table. TBF_KERNEL may be `backend`, `backend:mode` or
    `auto:mode`. Raises ConfigError when it is none of them and HardwareError when it names a backend that can't serve
    this device.
    """
    name, mode = _parse(os.environ.get("TBF_KERNEL", ""), mode)
    if name:
        plan = forced_plan(device, name, mode)
        if say:
            say(f"ternary kernels on {device}, set by TBF_KERNEL: {plan}")
        return plan
    report = probe_ternary(device, shapes, mode=mode)
    _agree(report, device)
    if say:
        say(report.table())
    return report.plan


def forced_plan(device: torch.device, name: str, mode: str) -> TernaryPlan:
    """Both stages by one backend. Raises HardwareError when it can't serve `device` or isn't exact there."""
    plan = TernaryPlan(name, name, mode)
    reason = _reason(name, device)
    for stage in STAGES:
        reason = reason or _inexact(get_backend(name, device.type), stage, device, AWKWARD_SHAPES)
    if reason is not None:
        raise HardwareError(f"TBF_KERNEL: '{name}' can't serve {device} ({reason}); unset it to choose freely")
    return plan


def _parse(setting: str, mode: str) -> tuple[str, str]:
    """Backend, empty for a free choice, and gradient mode."""
    name, _, asked_mode = setting.partition(":")
    if asked_mode and asked_mode not in GRADIENT_MODES:
        raise ConfigError(
            f"TBF_KERNEL={setting}: unknown gradient mode '{asked_mode}', {nearest(asked_mode, GRADIENT_MODES)}"
        )
    return "" if name == "auto" else name, asked_mode or mode


def probe_ternary(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = COMMON_SHAPES,
    *,
    mode: str = DEFAULT_MODE,
    refresh: bool = False,
) -> ProbeReport:
    """Checks and times every backend on `device`, or returns what an earlier process found (unless `refresh`)."""
    path = _verdict_path(device, shapes, mode)
    if not refresh and path.exists():
        report = _read(path)
        if report is not None:
            return report
    report = ProbeReport(_device_name(device), [list(shape) for shape in shapes], mode, [])
    checked = (*AWKWARD_SHAPES, *((TOKENS + 8, *shape) for shape in shapes))
    for name in BACKENDS:
        if _reason(name, device) is None:  # backends of other devices aren't worth a line
            backend = get_backend(name, device.type)
            report.rows += [ProbeRow(stage, name, _inexact(backend, stage, device, checked), 0.0) for stage in STAGES]
    for stage in STAGES:
        rows = [row for row in report.rows if row.stage == stage and row.reason is None]
        times = _time(stage, [row.backend for row in rows], device, shapes, mode)
        for row, ms in zip(rows, times, strict=True):
            row.ms = ms
    _write(path, report)
    return report


def _reason(name: str, device: torch.device) -> str | None:
    return BACKENDS[name](fastest_tools(device.type)).missing(device)


def _inexact(backend: Backend, stage: str, device: torch.device, shapes: Sequence[tuple[int, int, int]]) -> str | None:
    """Why `backend` isn't exact at a stage, or None. On CUDA, a kernel's error may show only the second time."""
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


def _time(
    stage: str, names: Sequence[str], device: torch.device, shapes: Sequence[tuple[int, int]], mode: str
) -> list[float]:
    """Milliseconds of each backend over all shapes, quantisation included: the best of interleaved rounds, since other
    programs can only slow a round down."""
    totals = [0.0] * len(names)
    generator = torch.Generator().manual_seed(0)
    for d, n in shapes:
        x, weight, dy = _sample(TOKENS, d, n, device, generator)
        calls = [_call(stage, name, x, weight, dy, device, mode) for name in names]
        times: list[list[float]] = [[] for _ in names]
        started = time.perf_counter()
        for round_ in range(8):
            if round_ > 2 and time.perf_counter() - started > SECONDS_PER_SHAPE:
                break
            for call, mine in zip(calls, times, strict=True):
                _wait(device)
                start = time.perf_counter()
                call()
                _wait(device)
                if round_ > 0:  # the first round warms up
                    mine.append(time.perf_counter() - start)
        totals = [total + 1e3 * min(mine) for total, mine in zip(totals, times, strict=True)]
    return totals


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


def _agree(report: ProbeReport, device: torch.device) -> None:
    """Makes all ranks see the same report: a backend serves only where all can use it, and the times are summed.

    Ranks that differ would round gradients differently, and save tensors that differ under recomputation.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    where = device if dist.get_backend() == "nccl" else torch.device("cpu")
    names = [(stage, name) for stage in STAGES for name in BACKENDS]
    mine = {(row.stage, row.backend): row for row in report.rows}
    usable = torch.tensor([int(key in mine and mine[key].reason is None) for key in names], device=where)
    times = torch.tensor([mine[key].ms if key in mine else 0.0 for key in names], device=where)
    dist.all_reduce(usable, op=dist.ReduceOp.MIN)
    dist.all_reduce(times, op=dist.ReduceOp.SUM)
    for key, ok, total in zip(names, usable.tolist(), times.tolist(), strict=True):
        if key in mine:
            mine[key].ms = total / dist.get_world_size()
            if not ok and mine[key].reason is None:
                mine[key].reason = "another rank can't use it"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    line = next((line for line in processor().splitlines() if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or device.type


def _verdict_path(device: torch.device, shapes: Sequence[tuple[int, int]], mode: str) -> Path:
    tools = get_backend("fp32", device.type).tools.name
    parts = [_device_name(device), torch.__version__, source_hash(), tools, torch.get_num_threads(), list(shapes), mode]
    if device.type == "cpu":
        parts.append(processor())
    return cache_folder() / f"probe-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"


def _read(path: Path) -> ProbeReport | None:
    try:
        data = json.loads(path.read_text())
        report = ProbeReport(**{**data, "rows": [ProbeRow(**row) for row in data["rows"]]})
        return report if all(name in BACKENDS for name in (report.plan.forward, report.plan.backward)) else None
    except (OSError, ValueError, TypeError, KeyError, ConfigError):
        return None  # a damaged verdict is found again


def _write(path: Path, report: ProbeReport) -> None:
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(asdict(report)))
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk costs the next process a probe, nothing else
