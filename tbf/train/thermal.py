"""Keeps a card from overheating: P40s have no fan of their own. Temperature, power and clock come from NVML.

The sensor is read by a thread of its own; the training thread only looks at the last reading.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_READ_EVERY_S = 5.0
_THROTTLED = 0x08 | 0x20 | 0x40 | 0x80  # of NVML's reasons: hardware slowdown, software and hardware heat, power brake


@dataclass(frozen=True)
class Reading:
    """One look at a card; NaN where it has no such sensor."""

    temperature_c: float = math.nan
    power_w: float = math.nan
    clock_mhz: float = math.nan
    throttled: bool = False
    """Whether the card slows itself down, for heat or by its power brake."""


class Thermometer:
    """Reads a sensor every few seconds between `start` and `stop`; `last` is the newest reading."""

    def __init__(self, read: Callable[[], Reading], every_s: float = _READ_EVERY_S) -> None:
        self.last = Reading()
        self._read, self._every_s = read, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tbf-thermal", daemon=True)

    def start(self) -> None:
        self.last = self._read()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.last = self._read()
            except Exception as error:  # a lost sensor must not end a run that trains well
                logger.warning("the card's sensors can no longer be read (%s): temperatures are not watched", error)
                self.last = Reading()
                return


def nvml_reader(uuid: str) -> Callable[[], Reading] | None:
    """Reads the card of this UUID; None, with the reason in the log, where NVML cannot."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception as error:  # not installed, no driver, or a card that NVML does not know
        logger.warning("temperatures are not watched (%s); pip install 'tbf[thermal]' brings NVML", error)
        return None

    def ask(function: Callable[..., Any], *arguments: Any) -> float:
        with contextlib.suppress(nvml.NVMLError):
            return float(function(handle, *arguments))
        return math.nan

    def read() -> Reading:
        reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return Reading(
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            power_w=ask(nvml.nvmlDeviceGetPowerUsage) / 1000,
            clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            throttled=not math.isnan(reasons) and bool(int(reasons) & _THROTTLED),
        )

    return read
