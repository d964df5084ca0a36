"""What cannot fit is refused before it starts; what runs out of memory says what was planned and what to change."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tbf.config import load_run_config
from tbf.errors import HardwareError
from tbf.planning.plan import Planner
from tbf.train import preflight as module
from tbf.train.ds_config import load_ds_config
from tbf.train.environment import ProcessInfo
from tbf.train.preflight import Preflight
from tests.helpers.gloo import run_distributed
from tests.helpers.runs import DS_ZERO2, DS_ZERO3, TINY, train, train_here, write_preset

GB = 10**9


@pytest.fixture
def preflight(monkeypatch):
    """Makes the preflight of a small run on a machine with so much memory free."""

    def make(free, *overrides, ranks=1, ds_config=DS_ZERO2):
        monkeypatch.setattr(module, "host_memory", lambda: (64 * GB, free))
        changes = [*(f"model.{key}={value}" for key, value in TINY["model"].items()), *overrides]
        engine, run = load_ds_config(ds_config, load_run_config("mini", changes), ranks)
        return Preflight(run, engine, ProcessInfo(0, 0, ranks, ranks, "test"), torch.device("cpu"))

    return make


def spoken(check):
    said = []
    check.check(said.append)
    return said


def test_what_fits_starts_without_a_trace(preflight, monkeypatch):
    monkeypatch.setattr(Planner, "memory", lambda *_: pytest.fail("traced"))
    check = preflight(20 * GB)
    (line,) = spoken(check)
    assert line.startswith("plan (estimated): ") and "GB of host memory" in line
    assert check.memory.fits


def test_what_cannot_fit_is_refused_with_three_cures(preflight):
    check = preflight(3 * GB, "train.micro_batch_size=64", "data.seq_len=512")
    with pytest.raises(HardwareError) as caught:
        check.check(lambda text: None)
    text = str(caught.value)
    assert "needs" in text and "GB of host memory" in text and "activations, most at" in text and "\n" not in text
    assert "(1) micro batch 8 instead of 64, accumulated 8 times" in text and "--ignore-plan" in text
    assert "(2)" in text and "(3)" in text and "(4)" not in text
    assert caught.value.exit_code == 5
    check.check(lambda text: None, ignore=True)


def test_a_need_between_is_traced_and_a_close_one_warned_of(preflight):
    check = preflight(20 * GB, "train.micro_batch_size=16")
    check.check(lambda text: None)
    needed = check._planner.memory(check.run, check.engine).verdicts[0].needed
    own = check._room().host - 20 * GB
    said = spoken(preflight(int(needed * 1.05 - own), "train.micro_batch_size=16"))
    assert said[0].startswith("plan (traced)") and "will be short or suffice by little" in said[1]
    with pytest.raises(HardwareError):
        preflight(int(needed * 0.95 - own), "train.micro_batch_size=16").check(lambda text: None)


def test_an_estimate_alone_refuses_only_the_hopeless(preflight, monkeypatch):
    monkeypatch.setattr("tbf.planning.visits.trace_pieces", lambda *_, **__: 1 / 0)
    check = preflight(20 * GB, "train.micro_batch_size=16")
    check.check(lambda text: None)
    needed, own = check.memory.verdicts[0].needed, check._room().host - 20 * GB
    said = spoken(preflight(int(needed * 0.9 - own), "train.micro_batch_size=16"))
    assert "will be short" in said[1]
    with pytest.raises(HardwareError):
        preflight(int(needed * 0.2 - own), "train.micro_batch_size=16").check(lambda text: None)


def test_ranks_of_a_node_share_its_memory(preflight):
    one, two = preflight(20 * GB), preflight(20 * GB, ranks=2)
    for check in (one, two):
        check.check(lambda text: None)
    assert two.memory.verdicts[0].needed > 1.8 * one.memory.verdicts[0].needed


def test_a_card_that_the_table_lacks_is_planned_too(preflight, monkeypatch):
    check = preflight(20 * GB)
    check.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * GB, 12 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Odd 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert spoken(check)[0].count("GPU memory") == 1
    check.run = check.run.replace(train={"micro_batch_size": 512}, data={"seq_len": 512})
    with pytest.raises(HardwareError, match=r"GB of GPU memory, and a card has 1\.45 GB free"):
        check.check(lambda text: None)


CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 22.38 GiB"
CPU_TEXT = "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate " \
    "4000000000 bytes. Error code 12 (Cannot allocate memory)"  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(CUDA_TEXT), "2.50 GiB were asked for"),
        (RuntimeError(CPU_TEXT), "rank 0 ran out of host memory: 4.00 GB were asked for"),
        (MemoryError(), "an allocation of unknown size failed"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "ran out of host memory"),
        (RuntimeError("CUDA error: out of memory"), "an allocation of unknown size"),
    ],
)
def test_an_end_for_want_of_memory_is_explained(preflight, error, words):
    check = preflight(20 * GB)
    check.check(lambda text: None)
    with pytest.raises(HardwareError) as caught, check.explained():
        raise error
    text = str(caught.value)
    assert words in text and "The plan (estimated) counted" in text and "20.00 of 64.00 GB are free now" in text
    assert "(1) micro batch 4 instead of 8" in text and "(3)" in text and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space"), ValueError("x")])
def test_other_errors_pass_as_they_are(preflight, error):
    check = preflight(20 * GB)
    check.check(lambda text: None)
    with pytest.raises(type(error)) as caught, check.explained():
        raise error
    assert caught.value is error


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    from tbf.system import host_memory

    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    assert host_memory((str(new), str(old)))[0] > GB
    (new / "memory.max").write_text(str(3 << 20))
    (new / "memory.current").write_text(str(2 << 20))
    (new / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 20}\n")
    assert host_memory((str(new), str(old))) == (3 << 20, 2 << 20)


def out_of_memory_in_a_step(rank, world_size, folder):
    """An allocation that no machine can serve, in the third step of a real run."""
    from tbf.train.trainer import Trainer

    step = Trainer.train_step

    def greedy(trainer, steps):
        if trainer.step == 2:
            torch.empty(10**15)
        return step(trainer, steps)

    Trainer.train_step = greedy
    with pytest.raises(HardwareError) as caught:
        train_here(rank, world_size, write_preset(Path(folder)), Path(folder) / "run")
    return str(caught.value)


def test_a_step_without_memory_ends_the_run_with_the_reason(tmp_path):
    (text,) = run_distributed(out_of_memory_in_a_step, 1, str(tmp_path))
    assert "ran out of host memory: 4000000.00 GB were asked for" in text and "(3)" in text
    assert "ran out of host memory" in (tmp_path / "run" / "run_status.json").read_text()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_program_refuses_on_every_rank_and_leaves_5(tmp_path, ranks):
    line = ("--preset", write_preset(tmp_path), "--run-dir", tmp_path / "run", "--set", "train.micro_batch_size=500000")
    code = 5 if ranks == 1 else 1  # torchrun has a code of its own
    done = train(*line, cache=tmp_path, ranks=ranks, ds_config=DS_ZERO3, expect=code)
    assert done.stderr.count("error: tiny needs") == ranks and (ranks == 1 or "exitcode  : 5" in done.stderr)
    assert not (tmp_path / "run").exists()
