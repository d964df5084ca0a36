"""Heartbeats over the network: they arrive, a lost connection costs little, strangers are not believed."""

import socket
import time

import pytest

from tbf.train.heartbeat_link import HeartbeatLink
from tbf.train.watchdog import Watchdog


@pytest.fixture
def ends():
    listener = socket.create_server(("127.0.0.1", 0))
    first = HeartbeatLink(0, None, "key", listener)
    second = HeartbeatLink(1, ("127.0.0.1", listener.getsockname()[1]), "key", None)
    yield first, second
    first.close()
    second.close()


def beat(rank, count):
    return {"rank": rank, "beat": count, "place": 0, "step": 0, "host": "h", "pid": 1, "left": False}


def test_beats_reach_everyone(ends):
    first, second = ends
    first.exchange(beat(0, 1), 1.0)
    assert second.exchange(beat(1, 5), 1.0)[0]["beat"] == 1 and second.connected
    assert first.exchange(beat(0, 2), 1.0)[1]["beat"] == 5


def test_a_rank_0_that_is_gone_is_known_at_once_and_found_again(ends):
    first, second = ends
    second.exchange(beat(1, 1), 1.0)
    address, second._address = second._address, ("127.0.0.1", 1)
    second._drop()
    started = time.monotonic()
    assert second.exchange(beat(1, 2), 1.0) == {1: beat(1, 1)} and not second.connected
    assert time.monotonic() - started < 2.0
    second._address = address
    second.exchange(beat(1, 3), 1.0)
    assert second.connected and first.exchange(beat(0, 1), 1.0)[1]["beat"] == 3


def test_a_stranger_is_not_believed(ends):
    first, second = ends
    stranger = HeartbeatLink(1, second._address, "guess", None)
    stranger.exchange(beat(1, 9), 1.0)
    assert not stranger.connected and 1 not in first.exchange(beat(0, 1), 1.0)


def test_a_watchdog_without_a_shared_folder_sees_the_others(ends, tmp_path):
    first, second = ends
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    said, others = [], []
    with Watchdog(folders[0], 0, 2, 3.0, link=first) as dog:
        dog._leave = said.append
        with Watchdog(folders[1], 1, 2, 3.0, link=second) as other:
            other._leave = others.append  # it sees nobody either, and may say so first
            for _ in range(20):
                dog.here(3)
                other.here(4)
                time.sleep(0.1)
            assert said == others == [] and dog._others[1].step == 4 and other._others[0].step == 3
            other.link.exchange = lambda beat, limit: {}  # the cable is pulled
            deadline = time.monotonic() + 30
            while not said and time.monotonic() < deadline:
                dog.here(3)
                time.sleep(0.1)
    assert said == [5]
    assert "or the network to it is down: no sign of it" in (folders[0] / "run_status.json").read_text()
