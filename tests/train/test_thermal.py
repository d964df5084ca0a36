"""The thermal guard on a card with a heating curve: it pauses, records, reports and stops."""

from __future__ import annotations

import logging
import math
import sys
from types import SimpleNamespace

import pytest

from tbf.train.callbacks.thermal import ThermalGuard
from tbf.train.signals import StopRequest
from tbf.train.thermal import Reading, Thermometer, nvml_reader
from tests.train.test_callbacks import metrics


class Card:
    """Warms by `heat` degrees a step towards no end, cools by one degree a second of pause; slows down at 88."""

    def __init__(self, heat, cooling=1.0):
        self.temperature, self.heat, self.cooling = 60.0, heat, cooling

    def read(self):
        return Reading(self.temperature, 200.0, 1300.0, throttled=self.temperature >= 88)


def run(card, tmp_path, steps, soft=82.0, hard=90.0):
    """Steps and pauses without real time; returns (guard, trainer, recorded metrics)."""
    guard = None

    def sleep(seconds):
        card.temperature -= card.cooling * seconds
        guard._thermometer.last = card.read()

    guard = ThermalGuard(card.read, soft, hard, sleep=sleep)
    here = []
    trainer = SimpleNamespace(
        rank=0, step=0, stop_request=StopRequest(tmp_path), watchdog=SimpleNamespace(here=here.append)
    )
    recorded = []
    guard._thermometer.start = lambda: None
    guard.on_start(trainer)
    for step in range(1, steps + 1):
        card.temperature += card.heat
        guard._thermometer.last = card.read()
        trainer.step = step
        recorded.append(metrics(step))
        guard.on_step(trainer, recorded[-1])
        if trainer.stop_request.requested:
            break
    guard.on_end(trainer, "done")
    return guard, trainer, recorded, here


def test_a_cool_card_is_left_alone_and_recorded(tmp_path, caplog):
    guard, _, recorded, _ = run(Card(heat=0.5), tmp_path, 20)
    assert guard.paused_s == 0 and not caplog.records
    assert recorded[-1].card_temperature_c == 70.0 and recorded[-1].card_power_w == 200.0


def test_a_hot_card_pauses_until_it_is_cooler_and_never_reaches_the_hard_limit(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        guard, trainer, recorded, here = run(Card(heat=2.0), tmp_path, 60)
    assert len(recorded) == 60 and not trainer.stop_request.requested
    hottest = max(row.card_temperature_c for row in recorded)
    assert 82 <= hottest < 85
    assert guard.paused_s > 0 and len(here) == guard.paused_s  # the watchdog knows that it is alive
    assert "paused 3 s, its card was at 82 °C" in caplog.text


def test_above_the_hard_limit_it_stops_with_a_checkpoint(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, trainer, recorded, _ = run(Card(heat=9.0, cooling=-0.5), tmp_path, 60)
    assert len(recorded) < 10 and trainer.stop_request.agree(trainer.stop_request.requested)
    assert trainer.stop_request.exit_code == 0
    assert "°C (train.thermal_hard_c 90): stopping after this step, with a checkpoint" in caplog.text
    assert "slows itself down" in caplog.text


def test_without_a_sensor_nothing_happens(tmp_path):
    card = SimpleNamespace(temperature=0.0, heat=0.0, read=Reading)
    guard, trainer, recorded, _ = run(card, tmp_path, 3)
    assert guard.paused_s == 0 and math.isnan(recorded[0].card_temperature_c) and not trainer.stop_request.requested


def test_a_lost_sensor_does_not_end_the_run(caplog):
    readings = iter([Reading(70.0)])
    thermometer = Thermometer(lambda: next(readings), every_s=0.01)
    thermometer.start()
    assert thermometer.last.temperature_c == 70.0
    thermometer._thread.join(10)
    assert math.isnan(thermometer.last.temperature_c) and "can no longer be read" in caplog.text
    thermometer.stop()


class FakeNvml:
    """pynvml with one card: a P40 at 85 °C that its heat slows down."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1
    NVMLError = type("NVMLError", (Exception,), {})
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetTemperature = staticmethod(lambda handle, sensor: 85)
    nvmlDeviceGetClockInfo = staticmethod(lambda handle, clock: 1303)
    nvmlDeviceGetCurrentClocksThrottleReasons = staticmethod(lambda handle: 0x40)

    @classmethod
    def nvmlDeviceGetHandleByUUID(cls, uuid):
        if uuid != "GPU-1234":
            raise cls.NVMLError("Not Found")
        return "handle"

    @classmethod
    def nvmlDeviceGetPowerUsage(cls, handle):
        raise cls.NVMLError("Not Supported")


def test_nvml(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml)
    reading = nvml_reader("1234")()
    assert (reading.temperature_c, reading.clock_mhz, reading.throttled) == (85.0, 1303.0, True)
    assert math.isnan(reading.power_w)
    assert nvml_reader("5678") is None and "Not Found" in caplog.text
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_reader("1234") is None and "tbf[thermal]" in caplog.text


@pytest.mark.parametrize("text", ["train.thermal_soft_c=95", "train.thermal_hard_c=0"])
def test_limits_that_make_no_sense_are_refused(text):
    from tbf.config import load_run_config
    from tbf.errors import ConfigError

    with pytest.raises(ConfigError, match="thermal_soft_c"):
        load_run_config("mini", [text])
