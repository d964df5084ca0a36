from __future__ import annotations

import pytest

from tbf.hardware import cpu_rates as rates_module
from tbf.hardware.cpu_rates import CpuRates
from tbf.planning import calibration
from tbf.planning.calibration import pass_factor

RATES = CpuRates(1, *[1e9] * 11, 1e-6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(rates_module, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(rates_module, "busy", lambda: False)


def test_a_pass_is_measured_once_against_its_operators(monkeypatch):
    monkeypatch.setattr(calibration, "cpu_seconds", lambda work, rates: (0.2, 0.2, 0.1, 0.1))
    monkeypatch.setattr(calibration, "_seconds_of_a_pass", lambda model: 1.0)
    assert pass_factor(RATES) == pytest.approx(3.0)  # products have 0.4 of the second
    monkeypatch.setattr(calibration, "_seconds_of_a_pass", lambda model: pytest.fail("measured again"))
    assert pass_factor(RATES) == pytest.approx(3.0)


def test_operators_that_take_longer_alone_shorten_no_plan(monkeypatch):
    monkeypatch.setattr(calibration, "_measure", lambda rates: 0.5)
    assert pass_factor(RATES) == 1.0
