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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tbf.errors import ConfigError, HardwareError, nearest
from tbf.ops.ternary_backends import BACKENDS, DEFAULT_MODE, GRADIENT_MODES, TernaryPlan, get_backend
from tbf.ops.ternary_build import cache_folder, source_hash
from tbf.ops.ternary_measure import AWKWARD_SHAPES, STAGES, time_backends, why_inexact, why_missing
from tbf.ops.ternary_nvrtc import SOURCE as CUDA_SOURCE
from tbf.system import processor

MIN_SPEEDUP = 1.15
TOKENS = 256
COMMON_SHAPES = ((384, 384), (384, 1536), (1024, 1024))  # (in, out) when no model is known


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
    refresh: bool = False,
) -> TernaryPlan:
    """The plan for a training run: all ranks of the process group call it and get the same one.

    `shapes` are the model's (in, out) pairs. `say` gets the table; `refresh` measures anew. TBF_KERNEL may be
    `backend`, `backend:mode` or `auto:mode`. Raises ConfigError when it is none of them and HardwareError when it names
    a backend that can't serve this device.
    """
    name, mode = _parse(os.environ.get("TBF_KERNEL", ""), mode)
    if name:
        plan = forced_plan(device, name, mode)
        if say:
            say(f"ternary kernels on {device}, set by TBF_KERNEL: {plan}")
        return plan
    report = probe_ternary(device, shapes, mode=mode, refresh=refresh)
    _agree(report, device)
    if say:
        say(report.table())
    return report.plan


def forced_plan(device: torch.device, name: str, mode: str) -> TernaryPlan:
    """Both stages by one backend. Raises HardwareError when it can't serve `device` or isn't exact there."""
    plan = TernaryPlan(name, name, mode)
    reason = why_missing(name, device)
    for stage in STAGES:
        reason = reason or why_inexact(get_backend(name, device.type), stage, device, AWKWARD_SHAPES)
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
    report = ProbeReport(device_name(device), [list(shape) for shape in shapes], mode, [])
    checked = (*AWKWARD_SHAPES, *((TOKENS + 8, *shape) for shape in shapes))
    for name in BACKENDS:
        if why_missing(name, device) is None:  # backends of other devices aren't worth a line
            backend = get_backend(name, device.type)
            report.rows += [
                ProbeRow(stage, name, why_inexact(backend, stage, device, checked), 0.0) for stage in STAGES
            ]
    for stage in STAGES:
        rows = [row for row in report.rows if row.stage == stage and row.reason is None]
        for shape in shapes:
            times = time_backends(stage, [row.backend for row in rows], device, (TOKENS, *shape), mode)
            for row, ms in zip(rows, times, strict=True):
                row.ms += ms
    _write(path, report)
    return report


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


def device_name(device: torch.device) -> str:
    """The model of the card or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    line = next((line for line in processor().splitlines() if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or device.type


def _verdict_path(device: torch.device, shapes: Sequence[tuple[int, int]], mode: str) -> Path:
    tools = get_backend("fp32", device.type).tools.name
    parts = [device_name(device), torch.__version__, source_hash(), tools, torch.get_num_threads(), list(shapes), mode]
    parts.append(processor() if device.type == "cpu" else CUDA_SOURCE.read_text())
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
