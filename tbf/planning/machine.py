"""Which machine a plan is for: one of the table, or the one at hand."""

from __future__ import annotations

import math
import os

import psutil
import torch

from tbf.errors import ConfigError, HardwareError
from tbf.hardware.devices import CPU, Device, find_device, recognise
from tbf.planning.plan import GIGABIT, Machine


def choose_machine(
    gpu: str,
    *,
    gpus: int | None = None,
    nodes: int = 1,
    host_gb: float | None = None,
    disk_gb: float | None = None,
    network_gbit: float = 10.0,
    latency_ms: float = 0.1,
    threads: int | None = None,
) -> Machine:
    """The machine that the options of `tbf plan` describe; `auto` looks at this one.

    Raises ConfigError for an unknown card or counts below one, HardwareError when `auto` finds a card that the table
    doesn't know.
    """
    counts = {"--gpus": gpus, "--nodes": nodes, "--host-ram": host_gb, "--disk": disk_gb, "--network": network_gbit}
    for name, value in counts.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    if not 0 <= latency_ms < math.inf:
        raise ConfigError(f"--latency is {latency_ms}; give milliseconds, e.g. 0.1")
    device, found = detect_device() if gpu == "auto" else (find_device(gpu), 1)
    gpus = gpus or found
    here = gpu == "auto" or not device.on_cuda
    host = host_gb * 1e9 if host_gb else (float(psutil.virtual_memory().total) if here else 128e9)
    if threads is None:
        threads = max(1, usable_cores() // gpus)
    disk = disk_gb * 1e9 if disk_gb else None
    return Machine(device, gpus, nodes, host, disk, network_gbit * GIGABIT, latency_ms / 1e3, threads)


def detect_device() -> tuple[Device, int]:
    """This machine's first card and the number of cards, or the CPU."""
    if not torch.cuda.is_available():
        return CPU, 1
    name, memory = torch.cuda.get_device_name(0), float(torch.cuda.get_device_properties(0).total_memory)
    device = recognise(name, memory)
    if device is None:
        raise HardwareError(f"--gpu auto: the planner has no figures for '{name}'; name a card like it, e.g. --gpu p40")
    return device, torch.cuda.device_count()


def usable_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)
