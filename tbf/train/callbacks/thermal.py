"""Cools a hot card by pauses between steps, and stops the run, with a checkpoint, before it is harmed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from tbf.train.callbacks.base import Callback, StepMetrics
from tbf.train.thermal import Reading, Thermometer

logger = logging.getLogger(__name__)

_COOLER_C = 3.0  # a pause lasts until the card is that much below the soft limit
_LONGEST_PAUSE_S = 60.0  # per step, so that a stop request is still seen
_LOOK_EVERY_S = 1.0


class ThermalGuard(Callback):
    """Runs on every rank for its own card; the others wait for a pausing rank in their next collective.

    Comes first in the list: it fills in the temperatures that the monitors record.
    """

    def __init__(
        self, read: Callable[[], Reading], soft_c: float, hard_c: float, *, sleep: Callable[[float], Any] = time.sleep
    ) -> None:
        self.soft_c, self.hard_c = soft_c, hard_c
        self.paused_s = 0.0
        """Seconds that this rank has paused so far."""
        self._thermometer = Thermometer(read)
        self._sleep = sleep
        self._throttled = False

    def on_start(self, trainer: Any) -> None:
        self._thermometer.start()

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        now = self._thermometer.last
        self._report_throttling(trainer, now)
        if now.temperature_c >= self.hard_c:
            trainer.stop_request.request(
                f"the card of rank {trainer.rank} is at {now.temperature_c:.0f} °C "
                f"(train.thermal_hard_c {self.hard_c:g})"
            )
        elif now.temperature_c >= self.soft_c:
            self._cool(trainer, now.temperature_c)
        metrics.card_temperature_c, metrics.card_power_w = now.temperature_c, now.power_w
        metrics.card_clock_mhz = now.clock_mhz

    def on_end(self, trainer: Any, status: str) -> None:
        self._thermometer.stop()

    def _cool(self, trainer: Any, temperature: float) -> None:
        paused = 0.0
        while self._thermometer.last.temperature_c > self.soft_c - _COOLER_C and paused < _LONGEST_PAUSE_S:
            if self._thermometer.last.temperature_c >= self.hard_c or trainer.stop_request.requested:
                break
            self._sleep(_LOOK_EVERY_S)
            paused += _LOOK_EVERY_S
            trainer.watchdog.here(trainer.step)
        self.paused_s += paused
        logger.warning(
            "step %d: rank %d paused %.0f s, its card was at %.0f °C (train.thermal_soft_c %g); %.0f s so far",
            *(trainer.step, trainer.rank, paused, temperature, self.soft_c, self.paused_s),
        )

    def _report_throttling(self, trainer: Any, now: Reading) -> None:
        if now.throttled != self._throttled:
            self._throttled = now.throttled
            what = "slows itself down" if now.throttled else "runs at full speed again"
            logger.warning(
                "step %d: the card of rank %d %s, at %.0f °C, %.0f W, %.0f MHz",
                *(trainer.step, trainer.rank, what, now.temperature_c, now.power_w, now.clock_mhz),
            )
