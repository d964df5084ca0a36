from __future__ import annotations

import json

import pytest
import torch

from tbf.errors import ConfigError
from tbf.hardware import cpu_rates as module
from tbf.hardware.cpu_rates import CpuRates, cpu_rates, shared
from tbf.hardware.devices import CPU, DEVICES, find_device, recognise
from tbf.hardware.probe import PEAK_FP32_FLOPS, peak_flops


@pytest.mark.parametrize("asked", ["p40", "Tesla P40", "tesla-p40", "P40"])
def test_cards_are_found_by_key_and_by_name(asked):
    assert find_device(asked) is DEVICES["p40"]
    assert find_device("cpu") is CPU


def test_an_unknown_card_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'p100'"):
        find_device("p1000x")


def test_the_driver_names_a_card_and_its_memory():
    found = recognise("NVIDIA A100-SXM4-80GB", 85e9)
    assert (found.key, found.memory) == ("a100", 85e9)
    assert recognise("NVIDIA GeForce GTX 1080 Ti", 11e9).key == "1080ti"
    assert recognise("NVIDIA P400", 2e9) is None


def test_the_table_agrees_with_the_peaks_of_the_trainer():
    for device in DEVICES.values():
        peak = peak_flops(device.name)
        assert peak is not None, device.name
        assert device.fp32_flops == pytest.approx(peak, rel=0.31)  # an H100 comes as PCIe and as SXM card
    assert len(DEVICES) == len(PEAK_FP32_FLOPS)


def test_dp4a_serves_exactly_the_cards_that_have_it_and_no_better_unit():
    served = {key for key, device in DEVICES.items() if device.int8_backend == "cuda_dp4a"}
    assert served == {"p40", "1080ti", "v100"}
    assert DEVICES["p100"].int8_backend == "fp32"


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    calls = []

    def measure(threads):
        calls.append(threads)
        return CpuRates(threads, *[1e9] * 11, 1e-6)

    monkeypatch.setattr(module, "_measure", measure)
    monkeypatch.setattr(module, "busy", lambda: True)
    cpu_rates(1)
    assert list(tmp_path.iterdir()) == []
    calls.clear()
    monkeypatch.setattr(module, "busy", lambda: False)
    first = cpu_rates(1)
    assert cpu_rates(1) == first and calls == [1]
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({"threads": 1}))  # damaged
    assert cpu_rates(1) == first and calls == [1, 1]


def test_measured_rates_are_plausible(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(module, "_seconds", lambda call, budget=0.0: call() is None or 1e-3)
    before = torch.get_num_threads()
    rates = cpu_rates(1)
    assert torch.get_num_threads() == before
    assert all(value > 0 for value in vars(rates).values())


def test_processes_share_rates_but_not_overheads():
    rates = CpuRates(2, *[8.0] * 11, 1e-6)
    half = shared(rates, 2)
    assert (half.gemm, half.adam, half.operator_s, half.threads) == (4.0, 4.0, 1e-6, 2)
