"""Facts about the accelerator, asked at run time and never assumed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tbf.errors import HardwareError

PEAK_FP32_FLOPS = {
    "Tesla P40": 11.76e12,
    "Tesla P100": 9.3e12,
    "GTX 1080 Ti": 11.34e12,
    "Tesla V100": 14.1e12,
    "Tesla T4": 8.1e12,
    "RTX 3090": 35.6e12,
    "A100": 19.5e12,
    "H100": 66.9e12,
}
"""Vendors' FP32 peaks without tensor cores (operations per second), by a part of the device's name."""


@dataclass(frozen=True)
class DeviceFacts:
    """What torch says about one card and about itself."""

    name: str
    capability: tuple[int, int]
    compiled_for: tuple[str, ...]
    torch_version: str


def cuda_facts(index: int) -> DeviceFacts:
    """Reads the facts of CUDA device `index`; launches no kernel."""
    return DeviceFacts(
        torch.cuda.get_device_name(index),
        torch.cuda.get_device_capability(index),
        tuple(torch.cuda.get_arch_list()),
        torch.__version__,
    )


def driver_release(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver's release, such as `580.95.05`, or None where no driver is loaded."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found.group(1) if found else None


def has_cubin(capability: tuple[int, int], compiled_for: Sequence[str]) -> bool:
    """Whether there is machine code for the card: of its major version and no higher minor one.

    sm_60 kernels serve a P40 (sm_61); a build that starts at sm_75 initialises on it and fails at its first kernel.
    """
    return any(
        kind == "sm" and major == capability[0] and minor <= capability[1]
        for kind, major, minor in map(_parse_architecture, compiled_for)
    )


def carries_kernels(capability: tuple[int, int], compiled_for: Sequence[str]) -> bool:
    """Whether a torch built for these architectures starts on the card: machine code, or older PTX to compile."""
    return has_cubin(capability, compiled_for) or any(
        kind == "compute" and (major, minor) <= capability
        for kind, major, minor in map(_parse_architecture, compiled_for)
    )


def _parse_architecture(name: str) -> tuple[str, int, int]:
    kind, _, number = name.rstrip("af").partition("_")
    return kind, int(number[:-1]), int(number[-1])


def check_device(facts: DeviceFacts) -> None:
    """Raises HardwareError when this torch has no kernels for the card, naming the release to install."""
    if carries_kernels(facts.capability, facts.compiled_for):
        return
    capability = f"sm_{facts.capability[0]}{facts.capability[1]}"
    cure = (
        "install torch==2.7.1, or a release up to 2.14 built for CUDA 12.6"
        if facts.capability < (7, 5)
        else "install a torch build for this card"
    )
    raise HardwareError(
        f"torch {facts.torch_version} has no kernels for {facts.name} ({capability}); it carries "
        f"{', '.join(facts.compiled_for)}: {cure}"
    )


def peak_flops(device_name: str) -> float | None:
    """FP32 peak of a known card, else None: a utilisation against a guessed peak would mislead."""
    return next((peak for name, peak in PEAK_FP32_FLOPS.items() if name in device_name), None)
