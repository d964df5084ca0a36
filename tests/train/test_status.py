"""run_status.json: true for a running, an ended and a killed process."""

import json
import os
import subprocess
import sys

import pytest

from tbf.errors import CheckpointError
from tbf.train import status
from tbf.train.status import RunStatus, read_status


def test_states_of_a_run(tmp_path):
    run = RunStatus(tmp_path)
    run.write("running", 3)
    seen = read_status(tmp_path)
    assert (seen["state"], seen["step"], seen["pid"]) == ("running", 3, os.getpid())
    run.write("stopped", 5, exit_code=143)
    assert read_status(tmp_path)["exit_code"] == 143
    assert [path.name for path in tmp_path.iterdir()] == ["run_status.json"]
    with pytest.raises(ValueError, match="no run state"):
        run.write("finished", 5)


def test_heartbeats_are_rare(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])
    run = RunStatus(tmp_path)
    run.write("running", 0)
    for step in range(1, 30):
        clock[0] += 1.0
        run.heartbeat(step)
        assert json.loads(run.path.read_text())["step"] == step // 10 * 10


def test_a_killed_run_does_not_pass_for_running(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from tbf.train.status import RunStatus\n"
        "RunStatus(Path(sys.argv[1])).write('running', 7)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    seen = read_status(tmp_path)
    assert (seen["state"], seen["step"]) == ("killed", 7)


def test_a_recycled_process_number_is_not_the_run(tmp_path):
    RunStatus(tmp_path).write("running", 7)
    path = tmp_path / "run_status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid_started": 12345.0}))
    assert read_status(tmp_path)["state"] == "killed"


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"state": "runn'])
def test_no_readable_status(tmp_path, text):
    if text is not None:
        (tmp_path / "run_status.json").write_text(text)
    with pytest.raises(CheckpointError, match="run_status"):
        read_status(tmp_path)
