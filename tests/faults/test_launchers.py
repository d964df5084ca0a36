"""Real runs under real launchers: signals, dead and stopped ranks, restarts. Minutes long."""

from __future__ import annotations

import signal

import pytest

from tests.faults import launched

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("launcher", launched.LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_launcher_leaves_a_checkpoint_and_no_orphan(cache, launcher, number):
    launched.end_launcher(cache, launcher, number)


def test_launch_py_killed_leaves_a_checkpoint_and_no_orphan(cache):
    launched.end_launcher(cache, "deepspeed", signal.SIGKILL, "launch.py")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_is_named(cache, number):
    assert launched.lose_rank(cache, number) < 30


def test_a_supervised_run_survives_a_killed_rank(cache):
    launched.restart(cache)
