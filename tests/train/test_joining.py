"""Ranks that meet: what is wrong with one ends all with the same words, and nobody waits for ever."""

import base64
import json
import socket
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, sys
from tbf.errors import ConfigError, run_program
from tbf.train import distributed
from tbf.train.environment import discover_process

def main():
    problem = ConfigError("no such preset") if os.environ.get("BROKEN") else None
    settings = {"train.seed": int(os.environ.get("SEED", 0))}
    facts = {"versions": {"torch": os.environ.get("TORCH", "1")}, "settings": settings}
    distributed.start(discover_process(), True, facts, problem)
    print("joined")
    distributed.stop()

sys.exit(run_program(main))
"""


def ranks(*environments, world_size=None, port=None, **shared):
    """Starts a rank for each environment; returns their exit codes and what they say, and the seconds it took."""
    port = port or free_port()
    started = time.monotonic()
    processes = []
    for rank, more in enumerate(environments):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size or len(environments), "MASTER_PORT": port}
        env = {**env, "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "PATH": "/usr/bin:/bin", **shared, **more}
        line = [sys.executable, "-c", PROGRAM]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(line, env={k: str(v) for k, v in env.items()}, **out))
    said = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], said, time.monotonic() - started


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def errors(said):
    return [[line for line in text.splitlines() if line.startswith("error:")] for text in said]


@pytest.mark.parametrize(
    ("second", "words", "code"),
    [
        ({"BROKEN": 1}, "no such preset (on rank 1", 2),
        pytest.param({"TORCH": 2}, "in its versions: torch 2 there, 1 here; install", 2, marks=pytest.mark.slow),
        pytest.param({"SEED": 7}, "in its settings: train.seed 7 there, 0 here", 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_with_one_rank_ends_all_with_one_line(second, words, code):
    codes, said, _ = ranks({}, second)
    assert codes == [code, code]
    first, other = errors(said)
    assert len(first) == 1 and words in first[0] and other == []


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_in_time():
    codes, said, seconds = ranks({}, {}, world_size=3, TBF_JOIN_TIMEOUT=3)
    assert codes == [5, 5] and seconds < 60
    assert "only 2 of 3 ranks joined" in said[0] and "no sign of rank 2" in said[0]


@pytest.mark.slow
def test_a_first_rank_that_is_not_there_is_named_by_the_others():
    codes, said, _ = ranks({"RANK": 1}, world_size=2, TBF_JOIN_TIMEOUT=3)
    assert codes == [5] and "cannot reach rank 0 at 127.0.0.1" in said[0]


@pytest.mark.slow
def test_ranks_that_count_themselves_differently_do_not_wait_for_each_other():
    codes, said, _ = ranks({}, {"WORLD_SIZE": 2}, world_size=3)
    assert codes == [2, 2]
    assert "rank 1 on" in said[0] and "counts 2 ranks" in said[0] and "same hostfile and slots" in said[0]


@pytest.mark.slow
def test_two_ranks_of_one_number_are_told_apart():
    codes, said, _ = ranks({}, {}, {"RANK": 1}, world_size=3, TBF_JOIN_TIMEOUT=8)
    assert codes == [5, 5, 5]
    assert sum("there is a rank 1 at 127.0.0.1" in text and "--node_rank" in text for text in said) == 1


@pytest.mark.slow
def test_waiting_is_said_early_and_names_the_machine_that_the_launcher_chose():
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0], "no-such-host": [0]}).encode()).decode()
    launcher = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[2]]))"
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PATH": "/usr/bin:/bin"}
    env |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "TBF_JOIN_TIMEOUT": "23"}
    line = [sys.executable, "-c", launcher, f"--world_info={world}", PROGRAM]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)
    missing = "rank 1 (no-such-host, a name that does not resolve here)"
    assert done.returncode == 5 and f"waiting: no sign yet of {missing} after 20 s" in done.stderr
    assert f"no sign of {missing}" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        codes, said, _ = ranks({}, world_size=2, port=port, TBF_JOIN_TIMEOUT=3)
    assert codes == [5] and f"cannot listen on port {port}" in said[0] and "ss -ltnp" in said[0]


@pytest.mark.slow
def test_a_program_that_is_no_store_is_not_waited_for():
    with socket.create_server(("", 0)) as other:
        codes, said, _ = ranks({"RANK": 1}, world_size=2, port=other.getsockname()[1], TBF_JOIN_TIMEOUT=3)
    assert codes == [5] and "cannot reach rank 0" in said[0] and "does not answer as a store" in said[0]
