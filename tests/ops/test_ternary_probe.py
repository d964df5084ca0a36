"""The choice of a kernel: exact or not at all, remembered, overruled, and the same on all ranks."""

import pytest
import torch

from tbf.errors import ConfigError, HardwareError
from tbf.model.bitlinear import BitLinear, set_ternary_plan, ternary_shapes
from tbf.ops import ternary_probe as probe
from tbf.ops.ternary_backends import BACKENDS, DEFAULT_MODE, Backend, CpuInt8, TernaryPlan
from tbf.ops.ternary_measure import AWKWARD_SHAPES, why_inexact
from tbf.ops.ternary_probe import ProbeReport, ProbeRow, choose_plan, default_plan, probe_ternary
from tbf.ops.ternary_reference import ReferenceTools
from tests.helpers.gloo import run_distributed

CPU = torch.device("cpu")
TINY = ((24, 16),)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TBF_KERNEL", raising=False)
    return tmp_path


def report(**times: float) -> ProbeReport:
    rows = [ProbeRow(stage, name, None, ms) for stage in probe.STAGES for name, ms in times.items()]
    return ProbeReport("a test", [], "int8_hilo", rows)


def test_exact_backends_are_timed_and_the_verdict_is_kept(monkeypatch):
    first = probe_ternary(CPU, TINY)
    assert {row.backend for row in first.rows} <= {"fp32", "cpu_int8", "cpu_vnni", "cpu_amx"}
    assert all(row.reason is None and row.ms > 0 for row in first.rows)
    monkeypatch.setattr(probe, "time_backends", lambda *_: pytest.fail("timed again"))
    assert probe_ternary(CPU, TINY) == first
    lines = first.table().splitlines()
    assert len(lines) == 1 + len(first.rows) and sum(" * " in line for line in lines) == 2


def test_damaged_verdicts_are_found_again(own_cache):
    probe_ternary(CPU, TINY)
    (verdict,) = own_cache.rglob("probe-*.json")
    for text in ("", "{", '{"rows": []}', verdict.read_text().replace("cpu_int8", "cpu_int9").replace("fp32", "fp33")):
        verdict.write_text(text)
        assert probe_ternary(CPU, TINY).plan.mode == DEFAULT_MODE


def test_a_backend_that_is_wrong_or_fails_is_never_taken(monkeypatch):
    class Wrong(CpuInt8):
        name = "wrong"

        def product(self, a, b):
            return super().product(a, b) + (a.shape[1] > 300)

    class Failing(CpuInt8):
        name = "failing"

        def product(self, a, b):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    for backend in (Wrong, Failing):
        monkeypatch.setitem(BACKENDS, backend.name, backend)
    found = probe_ternary(CPU, ((320, 8),))
    reasons = {row.backend: row.reason for row in found.rows if row.stage == "forward"}
    assert reasons["wrong"] == "not exact at 264x320x8"
    assert reasons["failing"] == "fails: CUBLAS_STATUS_NOT_SUPPORTED"
    assert "wrong" not in (found.plan.forward, found.plan.backward)
    assert "not exact" in found.table()


def test_int8_must_be_clearly_faster():
    assert report(fp32=1.15, cpu_int8=1.0).plan.forward == "cpu_int8"
    assert report(fp32=1.14, cpu_int8=1.0).plan.forward == "fp32"
    assert report(fp32=9.0, cpu_int8=3.0, cpu_vnni=2.0).plan.backward == "cpu_vnni"


def test_override(monkeypatch):
    said = []
    monkeypatch.setenv("TBF_KERNEL", "cpu_int8:int8")
    assert choose_plan(CPU, say=said.append) == default_plan(CPU) == TernaryPlan("cpu_int8", "cpu_int8", "int8")
    assert said == ["ternary kernels on cpu, set by TBF_KERNEL: forward by cpu_int8, int8 gradients by cpu_int8"]
    monkeypatch.setenv("TBF_KERNEL", "fp32")
    assert choose_plan(CPU, mode="int8") == TernaryPlan("fp32", "fp32", "int8")
    monkeypatch.setenv("TBF_KERNEL", "auto:fp32")
    assert default_plan(CPU).mode == "fp32"


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("vnni", ConfigError, "TBF_KERNEL: unknown backend 'vnni', did you mean 'cpu_vnni'"),
        ("fp32:int9", ConfigError, "unknown gradient mode 'int9', did you mean 'int8'"),
        ("cuda_int_mm", HardwareError, "'cuda_int_mm' can't serve cpu .*serves CUDA devices only"),
    ],
)
def test_bad_overrides(monkeypatch, setting, error, message):
    monkeypatch.setenv("TBF_KERNEL", setting)
    with pytest.raises(error, match=message):
        choose_plan(CPU)


def test_plan_reaches_every_layer_and_is_used():
    model = torch.nn.Sequential(BitLinear(8, (4, 4)), BitLinear(8, 8, ternary=False), BitLinear(8, 2))
    assert ternary_shapes(model) == [(8, 4), (8, 2)]
    plan = TernaryPlan("cpu_int8", "fp32")
    set_ternary_plan(model, plan)
    assert all(layer.ternary_plan is plan for layer in model)
    x = torch.randn(3, 8)
    assert all(map(torch.equal, model[0](x), BitLinear.forward(model[0], x)))


def choose_differently(rank: int, world_size: int) -> list[str]:
    """Rank 1 lacks a backend; both time the others differently."""
    mine = [report(fp32=9, cpu_int8=2, cpu_vnni=1), report(fp32=9, cpu_int8=3, cpu_vnni=1)][rank]
    if rank == 1:
        mine.rows = [row for row in mine.rows if row.backend != "cpu_vnni"]
    probe._agree(mine, CPU)
    torch.distributed.barrier()
    other = [report(fp32=9, cpu_int8=2, cpu_vnni=5), report(fp32=9, cpu_int8=6, cpu_vnni=2)][rank]
    probe._agree(other, CPU)
    return [mine.plan.forward, other.plan.backward]


def test_ranks_agree():
    assert run_distributed(choose_differently, 2) == [["cpu_int8", "cpu_vnni"]] * 2


def test_stages_are_judged_apart(monkeypatch):
    class ForwardOnly(CpuInt8):
        name = "forward_only"

        def backward(self, *args, **options):
            return tuple(part + 1 for part in super().backward(*args, **options))

    monkeypatch.setitem(BACKENDS, "forward_only", ForwardOnly)
    reasons = {row.stage: row.reason for row in probe_ternary(CPU, TINY).rows if row.backend == "forward_only"}
    assert reasons == {"forward": None, "backward": "not exact at 32x64x48"}


def test_fp32_is_its_own_reference():
    assert why_inexact(Backend(ReferenceTools()), "forward", CPU, AWKWARD_SHAPES) is None
