"""Real runs under real launchers: signals, dead and stopped ranks, restarts. Minutes long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tbf.train.status import read_status
from tests.helpers.runs import DS_ZERO2, ROOT, command, environment, write_preset

pytestmark = pytest.mark.slow
TRAIN = str(ROOT / "launch" / "train.py")
LONG = {"max_steps": 100_000, "save_every": 5, "eval_every": 1000, "decay_share": 0.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


class Run:
    """A run of two ranks that would take for ever."""

    def __init__(self, cache, name, program, *more, **train):
        self.dir = cache / name
        preset = write_preset(cache, **{**LONG, "micro_batch_size": 2, **train})
        line = [*program, "--ds_config", str(DS_ZERO2), "--preset", str(preset), "--run-dir", str(self.dir), *more]
        self.process = subprocess.Popen(line, cwd=cache, env=environment(), start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    def wait_for_a_checkpoint(self):
        until(lambda: list((self.dir / "checkpoints").glob("step-*/manifest.json")), 240)
        return self

    def ranks(self):
        return {path.stem: json.loads(path.read_text())["pid"] for path in (self.dir / "heartbeats").glob("rank*.json")}

    def newest(self):
        return max(int(path.parent.name[5:]) for path in (self.dir / "checkpoints").glob("step-*/manifest.json"))

    def end(self):
        with_group = [p for p in psutil.process_iter() if _group(p.pid) == self.process.pid]
        for process in with_group:
            process.kill()
        return self.process.communicate(timeout=60)[0]


def _group(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


LAUNCHERS = {"deepspeed": ["deepspeed", "--num_accelerators", "2", TRAIN], "torchrun": command(ranks=2)[:6]}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_launcher_leaves_a_checkpoint_and_no_orphan(cache, launcher, number):
    run = Run(cache, f"{launcher}-{number}", LAUNCHERS[launcher]).wait_for_a_checkpoint()
    try:
        ranks = run.ranks()
        assert len(ranks) == 2
        run.process.send_signal(number)
        until(lambda: all(gone(pid) for pid in ranks.values()), 60)
        status = read_status(run.dir)
        assert (status["state"], status["step"]) == ("stopped", run.newest())
    finally:
        print(run.end()[-3000:])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_is_named(cache, number):
    run = Run(cache, f"rank-{number}", LAUNCHERS["torchrun"], "--set", "train.stall_timeout_s=5")
    try:
        run.wait_for_a_checkpoint()
        ranks = run.ranks()
        started = time.monotonic()
        os.kill(ranks["rank1"], number)
        until(lambda: gone(ranks["rank0"]), 90)
        print(f"seconds to detect: {time.monotonic() - started:.1f}")
        status = read_status(run.dir)
        assert status["state"] == "failed" and "rank 1 (pid" in status["reason"]
    finally:
        print(run.end()[-3000:])


def test_a_supervised_run_survives_a_killed_rank(cache):
    program = [sys.executable, TRAIN, "--auto-restart", "2", "--restart-pause", "1", "--launcher",
               "deepspeed --num_accelerators 2"]  # fmt: skip
    run = Run(cache, "supervised", program).wait_for_a_checkpoint()
    try:
        first, ranks = run.newest(), run.ranks()
        os.kill(ranks["rank1"], signal.SIGKILL)
        until(lambda: run.ranks().values() != ranks.values() and run.newest() > first + 5, 240)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(120) == 143
        assert read_status(run.dir)["state"] == "stopped"
    finally:
        print(run.end()[-3000:])
