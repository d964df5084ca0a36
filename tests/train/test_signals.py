"""Requests to stop: what they set, what they leave alone, and that a second Ctrl-C always works."""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tbf.train.signals import StopRequest, duration


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
def test_a_signal_is_noted_and_the_old_handlers_return(tmp_path, number, code):
    before = signal.getsignal(number)
    with StopRequest(tmp_path) as request:
        assert not request.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # launchers repeat themselves
        wait_for(lambda: request.requested)
        assert not request.agreed
        assert request.agree(request.requested) and request.exit_code == code
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_ranks_agree_on_one_exit_code(tmp_path):
    asked, other = StopRequest(tmp_path), StopRequest(tmp_path)
    assert not other.agree(0)
    asked.request("time is up", exit_code=0)
    total = asked.requested + other.requested
    assert asked.agree(total) and other.agree(total)
    assert asked.exit_code == other.exit_code == 0


def test_the_strongest_reason_decides(tmp_path):
    requests = [StopRequest(tmp_path) for _ in range(1000)]
    for index, request in enumerate(requests):
        request.request("told", exit_code=143 if index % 2 else 0)
    total = float(sum(request.requested for request in requests))
    assert requests[0].agree(total) and requests[0].exit_code == 143
    requests[0].agree(total + StopRequest(tmp_path).requested)
    interrupted = StopRequest(tmp_path)
    interrupted.request("Ctrl-C", exit_code=130)
    requests[0].agree(total + interrupted.requested)
    assert requests[0].exit_code == 130


def test_a_trainer_may_set_agreed_itself(tmp_path):
    request = StopRequest(tmp_path)
    request.agreed = True
    assert request.exit_code == 143
    request.request("file", exit_code=0)
    assert request.exit_code == 0


def test_the_stop_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tbf.train.signals._LOOK_EVERY_S", 0.0)
    stop = tmp_path / "STOP"
    stop.touch()
    with StopRequest(tmp_path) as request:
        assert not stop.exists() and not request.requested  # one from before does not count
        stop.touch()
        assert request.requested
        assert stop.exists()  # the other ranks look for it too
        request.agree(request.requested)
    assert request.exit_code == 0 and not stop.exists()


def test_the_time_limit_counts_from_the_start_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tbf.train.signals._LOOK_EVERY_S", 0.0)
    assert not StopRequest(tmp_path, max_seconds=1e6).requested
    late = StopRequest(tmp_path, max_seconds=0.0)
    assert late.agree(late.requested) and late.exit_code == 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("45m", 2700), ("3h30m", 12600), ("2d", 172800)]
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3 h", "-5", "1.5h", "m"])
def test_what_is_no_duration(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no duration"):
        duration(text)


CHAIN = """
import subprocess, sys, time
from pathlib import Path
depth = int(sys.argv[1])
if depth:
    marks = {2: ["deepspeed.launcher.launch"], 1: []}[depth]
    subprocess.run([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2], sys.argv[3], *marks])
else:
    from tbf.train import signals
    signals._LOOK_EVERY_S = 0.0
    request = signals.StopRequest(Path(sys.argv[3]))
    assert not request.requested
    Path(sys.argv[3], "ready").touch()
    while not request.agree(request.requested):
        time.sleep(0.02)
    Path(sys.argv[3], "stopped").write_text(str(request.exit_code))
"""


@pytest.mark.parametrize("victim", ["deepspeed", "launch.py"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_whose_launcher_is_gone_stops_as_if_terminated(tmp_path, victim, number):
    """The chain of `deepspeed`: runner, launch.py, rank; named as theirs are."""
    runner = tmp_path / "deepspeed"
    runner.write_text(CHAIN)
    process = subprocess.Popen([sys.executable, runner, "2", CHAIN, str(tmp_path)])
    wait_for((tmp_path / "ready").exists, 60)
    (launch,) = psutil.Process(process.pid).children()
    (rank,) = launch.children()
    (process if victim == "deepspeed" else launch).send_signal(number)
    wait_for((tmp_path / "stopped").exists, 60)
    assert (tmp_path / "stopped").read_text() == "143"
    rank.wait(10)
    process.wait(10)


def test_a_worker_can_be_terminated_without_stopping_the_trainer(tmp_path):
    with StopRequest(tmp_path) as request:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM
        time.sleep(0.1)
        assert not request.requested


STUCK = """
import ctypes, sys
from pathlib import Path
from tbf.train.signals import StopRequest
with StopRequest(Path(sys.argv[1])):
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # never returns, like a collective whose peer is gone
"""


def test_a_second_interrupt_leaves_at_once_even_from_inside_c_code(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # the same press, passed on twice
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        assert "press Ctrl-C again" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
