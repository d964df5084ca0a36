"""Every ternary backend that a device has, checked bit by bit and timed: the evidence behind the trainer's choice.

`tbf bench gemm` prints it. Shapes are (tokens M, in D, out N). Operations are those of the layer, 2MDN forward and 4MDN
backward, whatever a backend makes of them, so that GOP/s compare.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import tbf
from tbf.errors import ConfigError, HardwareError
from tbf.hardware.probe import check_device, cuda_facts, driver_release
from tbf.ops.ternary_backends import BACKENDS, DEFAULT_MODE, TernaryPlan, get_backend
from tbf.ops.ternary_cuda import cuda_tools, has_fast_dp4a
from tbf.ops.ternary_measure import AWKWARD_SHAPES, STAGES, time_backends, why_inexact, why_missing
from tbf.ops.ternary_nvrtc import nvrtc_version
from tbf.ops.ternary_probe import choose_plan, device_name

Shape = tuple[int, int, int]
# Beside the probe's: single elements, and a little less or more than the tiles (128 wide, 32 deep) of the kernels.
CHECKED_SHAPES: tuple[Shape, ...] = (*AWKWARD_SHAPES, (1, 1, 1), (65, 100, 40), (130, 36, 129), (200, 64, 260))
INT_MM_CAPABILITY = (7, 5)  # cublasLt promises int8 products from here on; below it may refuse, or be wrong
FAILURES = (HardwareError, RuntimeError, OSError)


@dataclass
class GemmRow:
    """One backend at one stage and shape (None: the awkward ones).

    `exact` is None for FP32 gradients, which are not rounded and so have nothing to be compared with. `reason` says why
    a backend can't serve; there are no times then.
    """

    stage: str
    backend: str
    shape: Shape | None
    exact: bool | None
    reason: str | None = None
    ms: float | None = None
    gops: float | None = None
    over_fp32: float | None = None


@dataclass
class GemmReport:
    """All rows, what they were measured on, and what a backend that should work failed at."""

    machine: dict[str, str]
    mode: str
    plan: TernaryPlan | None = None
    absent: dict[str, str] = field(default_factory=dict)
    rows: list[GemmRow] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        chosen = {stage: getattr(self.plan, stage, None) for stage in STAGES}
        return {**asdict(self), "chosen": chosen}

    def text(self) -> str:
        """The report for people, ready to be pasted."""
        lines = [f"{key:<9}{value}" for key, value in self.machine.items()]
        head = f"{'stage':10}{'backend':13}{'tokens x in x out':19}{'exact':6}{'ms':>9}{'GOP/s':>9}{'x FP32':>8}"
        lines += ["", f"  {head}   (* taken in training; {self.mode} gradients)"]
        for row in self.rows:
            times = "" if row.ms is None else f"{row.ms:9.3f}{row.gops:9,.0f}{row.over_fp32 or 0:8.2f}"
            exact = "yes" if row.reason is None else "NO"
            mark = "*" if self.plan and row.backend == getattr(self.plan, row.stage) else " "
            line = (
                f"{mark} {row.stage:10}{row.backend:13}{_shape_text(row.shape):19}{exact:6}{times or row.reason or ''}"
            )
            lines.append(line.rstrip())
        lines += ["", *(f"not here: {name} ({reason})" for name, reason in self.absent.items())]
        lines += [f"training takes: {self.plan}"] if self.plan else []
        lines += [f"FAULT: {fault}" for fault in self.faults] or ["every backend that should work here is exact"]
        return "\n".join(lines)


def choose_device(name: str) -> torch.device:
    """`auto` is the first card that torch sees, else the CPU. Raises ConfigError on other names than cpu and cuda, and
    HardwareError when the device can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device '{name}': auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        index, count = device.index or 0, torch.cuda.device_count()
        if index >= count:
            raise HardwareError(f"--device {name}: torch {torch.__version__} sees {count} card(s); see `tbf doctor`")
        check_device(cuda_facts(index))
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device


def bench_gemm(
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    *,
    mode: str = DEFAULT_MODE,
    say: Callable[[str], None] = lambda text: None,
) -> GemmReport:
    """Checks and times all backends of `device` at the (in, out) `shapes`, then measures the trainer's choice anew."""
    report = GemmReport(_describe(device), mode)
    for name in BACKENDS:
        reason = _why_absent(name, device)
        if reason is not None:
            report.absent[name] = reason
            if device.type == "cuda" and _should_work(name, device):
                report.faults.append(f"{name}: {reason}")
    for stage in STAGES:
        for shape in (None, *((tokens, *shape) for shape in shapes)):
            say(f"{stage} at {_shape_text(shape)} ...")
            report.rows += _measure(stage, shape, device, mode, report.faults)
    try:
        report.plan = choose_plan(device, shapes, mode=mode, refresh=True)
    except FAILURES as error:
        report.faults.append(f"no kernels can be chosen: {str(error).splitlines()[0]}")
    return report


def _measure(stage: str, shape: Shape | None, device: torch.device, mode: str, faults: list[str]) -> list[GemmRow]:
    """One row per backend; times only where it is exact, and not at the awkward shapes."""
    rows = []
    for name in BACKENDS:
        if why_missing(name, device) is None:
            if name == "fp32" and stage == "backward":
                rows += [GemmRow(stage, name, shape, exact=None)] if shape else []
                continue
            checked = CHECKED_SHAPES if shape is None else (shape,)
            reason = why_inexact(get_backend(name, device.type), stage, device, checked)
            rows.append(GemmRow(stage, name, shape, reason is None, reason))
            if reason is not None and _should_work(name, device):
                faults.append(f"{name} {stage}: {reason}")
    if shape is None:
        return rows
    exact = [row for row in rows if row.reason is None]
    try:
        times = time_backends(stage, [row.backend for row in exact], device, shape, mode)
    except FAILURES as error:  # whatever broke the card's context takes the others down with it
        faults.append(f"timing {stage} at {_shape_text(shape)}: {str(error).splitlines()[0]}")
        return rows
    base = next((ms for row, ms in zip(exact, times) if row.backend == "fp32"), None)
    operations = (2 if stage == "forward" else 4) * shape[0] * shape[1] * shape[2]
    for row, ms in zip(exact, times, strict=True):
        row.ms, row.gops, row.over_fp32 = ms, operations / ms / 1e6, base / ms if base else None
    return rows


def _should_work(name: str, device: torch.device) -> bool:
    """Whether it is a fault if this backend isn't exact here. Only `cuda_int_mm` is tried where nobody promises it."""
    if device.type != "cuda" or name == "fp32":
        return True
    capability = torch.cuda.get_device_capability(device)
    return capability >= INT_MM_CAPABILITY if name == "cuda_int_mm" else has_fast_dp4a(capability)


def _why_absent(name: str, device: torch.device) -> str | None:
    """Why a backend made for this kind of device doesn't serve it, with the compiler's or the driver's own words."""
    reason = why_missing(name, device)
    if reason is None or not name.startswith(device.type):
        return None
    if name == "cuda_dp4a":
        try:
            cuda_tools(device.index or 0)
        except FAILURES as error:
            return str(error).splitlines()[0]
    return reason


def _describe(device: torch.device) -> dict[str, str]:
    """What a reader of the report must know of the machine; no host name."""
    facts = {"device": device_name(device)}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        facts["device"] += f", capability {major}.{minor}, {memory / 2**30:.1f} GiB"
        facts["driver"] = driver_release() or "unknown"
        facts["CUDA"] = f"{torch.version.cuda}, kernels compiled by NVRTC {_nvrtc()}"
    else:
        facts["threads"] = str(torch.get_num_threads())
    return facts | {"torch": torch.__version__, "tbf": tbf.__version__, "date": time.strftime("%Y-%m-%d")}


def _nvrtc() -> str:
    try:
        return nvrtc_version()
    except HardwareError as error:
        return f"unknown ({error})"


def _shape_text(shape: Shape | None) -> str:
    return "awkward shapes" if shape is None else "x".join(map(str, shape))
