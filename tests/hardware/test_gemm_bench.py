"""The bench on this machine's CPU, and its verdicts where a backend is wrong, refuses or breaks its device."""

from __future__ import annotations

import json

import pytest
import torch

from tbf import cli
from tbf.errors import ConfigError, HardwareError
from tbf.hardware import gemm_bench
from tbf.hardware.gemm_bench import CHECKED_SHAPES, bench_gemm, choose_device
from tbf.hardware.probe import driver_release
from tbf.ops import ternary_measure
from tbf.ops.ternary_backends import BACKENDS, CpuInt8, TernaryPlan
from tbf.ops.ternary_native import native_tools

CPU = torch.device("cpu")
PASCAL, VOLTA, TURING = (6, 1), (7, 0), (7, 5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    native_tools()  # compiled once, in the user's cache; only verdicts go into the fresh one
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TBF_MALLOC", "0")
    monkeypatch.delenv("TBF_KERNEL", raising=False)
    monkeypatch.setattr(ternary_measure, "MOST_ROUNDS", 2)  # no verdict of these tests rests on a time


class Wrong(CpuInt8):
    """Right until the last row of many."""

    name = "cpu_wrong"

    def product(self, a, b):
        products = super().product(a, b)
        products[-1] += len(a) > 128
        return products


def test_every_backend_of_the_cpu_is_checked_and_timed():
    said = []
    report = bench_gemm(CPU, [(24, 16), (16, 8)], 40, say=said.append)
    here = {row.backend for row in report.rows}
    assert {"fp32", "cpu_int8"} <= here and not any(name.startswith("cuda") for name in {*here, *report.absent})
    assert not report.faults and report.plan is not None
    for row in report.rows:
        assert row.exact is (None if (row.backend, row.stage) == ("fp32", "backward") else True)
        if row.shape is not None:
            tokens, d, n = row.shape
            assert tokens == 40 and row.ms > 0
            assert row.gops * row.ms * 1e6 == pytest.approx((2 if row.stage == "forward" else 4) * tokens * d * n)
    assert len([row for row in report.rows if row.shape == (40, 16, 8)]) == 2 * len(here)
    assert len(said) == 6
    text = report.text()
    assert f"training takes: {report.plan}" in text and "every backend that should work here is exact" in text
    assert sum(line.startswith("* ") for line in text.splitlines()) in (5, 6)  # an FP32 backward has no awkward row


def test_a_wrong_backend_is_a_fault_and_has_no_times(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu_wrong", Wrong)
    report = bench_gemm(CPU, [(24, 16)], 40)
    wrong = [row for row in report.rows if row.backend == "cpu_wrong" and row.exact is False]
    assert [(row.stage, row.shape) for row in wrong] == [("forward", None), ("backward", None)]
    assert wrong[0].reason == "not exact at 130x36x129" and wrong[0].ms is None
    assert report.faults == [f"cpu_wrong {row.stage}: {row.reason}" for row in wrong]
    assert "cpu_wrong" not in (report.plan.forward, report.plan.backward)
    assert "FAULT: cpu_wrong forward" in report.text()


def test_checked_shapes_hold_every_kind_of_rest():
    for size, axis in ((128, 0), (128, 2), (32, 1)):
        rests = {shape[axis] % size for shape in CHECKED_SHAPES}
        assert len(rests) >= 4
    assert any(shape[0] > 128 and shape[2] > 128 for shape in CHECKED_SHAPES)


def test_a_broken_device_is_reported_and_not_raised(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(gemm_bench, "time_backends", broken)
    monkeypatch.setattr(gemm_bench, "choose_plan", broken)
    report = bench_gemm(CPU, [(24, 16)], 40)
    assert report.plan is None and "training takes" not in report.text()
    assert report.faults == [
        "timing forward at 40x24x16: CUDA error: an illegal memory access was encountered",
        "timing backward at 40x24x16: CUDA error: an illegal memory access was encountered",
        "no kernels can be chosen: CUDA error: an illegal memory access was encountered",
    ]
    json.dumps(report.to_dict())


@pytest.mark.parametrize(
    ("name", "capability", "fault"),
    [
        ("cuda_int_mm", PASCAL, False),
        ("cuda_int_mm", VOLTA, False),
        ("cuda_int_mm", TURING, True),
        ("cuda_dp4a", PASCAL, True),
        ("cuda_dp4a", (6, 0), False),
        ("cuda_dp4a", (6, 2), False),
        ("cuda_dp4a", (9, 0), True),
        ("fp32", (6, 0), True),
    ],
)
def test_only_what_is_promised_on_a_card_is_a_fault(monkeypatch, name, capability, fault):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gemm_bench._should_work(name, torch.device("cuda", 0)) is fault


def test_absent_kernels_say_the_compilers_words(monkeypatch):
    def no_compiler(index):
        raise HardwareError("no usable NVRTC library among libnvrtc.so.12")

    monkeypatch.setattr(gemm_bench, "cuda_tools", no_compiler)
    monkeypatch.setattr(gemm_bench, "why_missing", lambda name, device: "its kernels could not be built")
    assert "no usable NVRTC" in gemm_bench._why_absent("cuda_dp4a", torch.device("cuda", 0))
    assert gemm_bench._why_absent("cpu_int8", torch.device("cuda", 0)) is None  # of another device: not worth a line


def test_devices():
    assert choose_device("cpu") == CPU
    for name in ("gpu", "cuda:x", "mps", ""):
        with pytest.raises(ConfigError, match="cuda:N"):
            choose_device(name)
    with pytest.raises(HardwareError, match="card"):
        choose_device(f"cuda:{torch.cuda.device_count()}")


def test_the_command(monkeypatch, capsys):
    assert cli.main(["bench", "gemm", "--device", "cpu", "--tokens", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["preset"] == "mini, 8 tokens" and set(found["chosen"]) == {"forward", "backward"}
    assert {tuple(row["shape"] or ()) for row in found["rows"]} == {(), (8, 384, 768), (8, 768, 384), (8, 384, 384)}
    assert cli.main(["bench", "gemm", "--tokens", "0"]) == 2
    assert cli.main(["bench", "gemm", "--preset", "bert_control"]) == 2  # nothing ternary
    faulty = gemm_bench.GemmReport({}, "int8_hilo", TernaryPlan("fp32", "fp32"), faults=["cuda_dp4a forward: wrong"])
    monkeypatch.setattr(gemm_bench, "bench_gemm", lambda *_, **__: faulty)
    assert cli.main(["bench", "gemm", "--device", "cpu"]) == 5
    assert "FAULT: cuda_dp4a forward: wrong" in capsys.readouterr().out


def test_driver_release(tmp_path):
    shown = tmp_path / "version"
    for line, release in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        ("something else", None),
    ):
        shown.write_text(line + "\nGCC version: gcc version 12.3.0\n")
        assert driver_release(shown) == release
    assert driver_release(tmp_path / "absent") is None
