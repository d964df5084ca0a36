"""The watchdog: a dead, a stopped and a stuck rank are named, and nobody else is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tbf.errors import CheckpointError, EngineError
from tbf.train.watchdog import FOLDER, Watchdog, last_step

RANK = """
import sys, time
from pathlib import Path
from tbf.train.watchdog import Watchdog
run_dir, rank, world, timeout, moves = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
with Watchdog(run_dir, rank, world, timeout) as dog:
    (run_dir / f"ready{rank}").touch()
    for step in range(10**9):
        if step < moves:
            dog.here(step)
        time.sleep(0.02)
"""  # noqa: E501


@pytest.fixture
def ranks(tmp_path):
    """Starts ranks as processes and kills what is left of them."""
    started = []

    def start(rank, world, timeout, moves=10**9):
        command = [sys.executable, "-c", RANK, *map(str, (tmp_path, rank, world, timeout, moves))]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ready(tmp_path, *numbers):
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_rank_is_named_and_the_others_leave(tmp_path, ranks, number):
    first, second, third = (ranks(rank, 3, 2.0) for rank in range(3))
    ready(tmp_path, 0, 1, 2)
    second.send_signal(number)
    for survivor in (first, third):
        assert survivor.wait(60) == EngineError.exit_code
        told = survivor.stderr.read()
        assert "rank 1 (pid" in told and "dead or stopped" in told and f"{second.pid} on" in told
    assert "watchdog" in (tmp_path / FOLDER / "stacks_rank0.txt").read_text()
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert status["state"] == "failed" and "rank 1" in status["reason"]


def test_a_stuck_rank_is_named(tmp_path, ranks):
    """Its process lives and its heart beats, but its training thread does not move, and the others wait for it."""
    first, second = ranks(0, 2, 1.5, moves=60), ranks(1, 2, 1.5, moves=20)
    assert first.wait(60) == second.wait(60) == EngineError.exit_code
    assert "no rank has moved for 2 s" in (told := first.stderr.read()) and "rank 1 is the furthest back" in told


def test_a_slow_rank_that_moves_is_left_alone(tmp_path):
    with Watchdog(tmp_path, 0, 1, 0.4) as dog:
        dog._leave = lambda code: pytest.fail("gave up")
        for step in range(10):
            dog.here(step)
            time.sleep(0.1)
    assert last_step(tmp_path) == 9
    assert json.loads((tmp_path / FOLDER / "rank0.json").read_text())["left"]


def test_a_lost_connection_is_explained_by_the_rank_that_left(tmp_path, ranks):
    other = ranks(1, 2, 5.0)
    ready(tmp_path, 1)
    with Watchdog(tmp_path, 0, 2, 5.0) as dog:
        with pytest.raises(RuntimeError, match="tensor shapes"), dog.explained():  # nobody left: not ours to explain
            dog.timeout = 0.2
            raise RuntimeError("tensor shapes differ")
        dog.timeout = 5.0
        time.sleep(1.0)
        other.kill()
        other.wait()
        with pytest.raises(EngineError, match=rf"rank 1 \(pid {other.pid}.*has ended.*reset by peer"), dog.explained():
            raise RuntimeError("Connection reset by peer")


def test_a_folder_that_takes_no_beat_is_named_before_the_first_step(tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"), Watchdog(tmp_path, 0, 1, 1.0):
        pass


def test_timeout_0_watches_nothing(tmp_path):
    with Watchdog(tmp_path, 0, 2, 0.0):
        assert os.listdir(tmp_path) == []  # noqa: PTH208
