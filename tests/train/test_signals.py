"""Requests to stop: what they set, what they leave alone, and that a second Ctrl-C always works."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from tbf.train.signals import StopRequest


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
