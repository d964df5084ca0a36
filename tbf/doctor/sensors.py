"""Cards as NVIDIA's management library sees them, whatever torch was built for. Needs the extra `thermal`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tbf.doctor.machine import Gpu


def load() -> ModuleType | None:
    """pynvml, or None where it isn't installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def read(nvml: Any) -> dict[str, Gpu]:
    """Cards by UUID, in the bus's order; empty without a driver. `nvml` is pynvml, or stands in for it."""
    with _session(nvml) as opened:
        if not opened:
            return {}
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return {_text(nvml.nvmlDeviceGetUUID(handle)): _gpu(nvml, handle) for handle in handles}


def driver(nvml: Any) -> str | None:
    """The driver's release."""
    with _session(nvml) as opened:
        return _text(nvml.nvmlSystemGetDriverVersion()) if opened else None


@contextmanager
def _session(nvml: Any) -> Iterator[bool]:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        """None where a card has no such sensor: a P40 has no fan, a GeForce no ECC."""
        try:
            return function(handle, *arguments)
        except nvml.NVMLError:
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    ecc = ask(nvml.nvmlDeviceGetEccMode)  # (now, after the next reboot)
    errors = ask(nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        memory=memory.total,
        used=memory.used,
        temperature=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        lanes=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        most_lanes=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        generation=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),  # an idle card runs at a lower one
        ecc=None if ecc is None else bool(ecc[0]),
        memory_errors=errors,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
