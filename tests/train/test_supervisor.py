"""The supervisor: what it starts again, what it does not, and that it leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tbf.errors import ConfigError, TrainingHalted
from tbf.train.supervisor import supervise, supervised_command
from tests.helpers.runs import ROOT, environment

# A stand-in for a run: its n-th start fails or ends as the n-th letter of its script says, some steps further on.
RUN = """
import os, signal, sys, json
from pathlib import Path
from tbf.train.status import RunStatus
from tbf.train.watchdog import Watchdog
run_dir, script = Path(sys.argv[1]), sys.argv[2]
starts = run_dir / "starts"
count = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(count + 1))
what, step = script[count].lower(), 10 * count if script[count].islower() else 7
status = RunStatus(run_dir)
dog = Watchdog(run_dir, 0, 1, 30.0)
with dog:
    status.write("running", 0)
    dog.here(step)
if what == "d":
    status.write("done", step)
elif what == "s":
    status.write("stopped", step); sys.exit(143)
elif what == "h":
    status.write("halted", step); sys.exit(6)
elif what == "f":
    status.write("failed", step, reason="disk full"); sys.exit(4)
elif what == "k":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "o":  # a launcher that says all is well
    sys.exit(0)
elif what == "c":
    sys.exit(2)
"""


def outcome(tmp_path, script, restarts=5):
    code = supervise([sys.executable, "-c", RUN, str(tmp_path), script], tmp_path, restarts, pause_s=0.0)
    return code, int((tmp_path / "starts").read_text())


@pytest.mark.parametrize(
    ("script", "code", "starts"),
    [("d", 0, 1), ("s", 143, 1), ("h", 6, 1), ("c", 2, 1), ("fd", 0, 2), ("kfd", 0, 3), ("okd", 0, 3)],
)
def test_what_is_started_again(tmp_path, script, code, starts):
    assert outcome(tmp_path, script) == (code, starts)


def test_it_gives_up_after_as_many_restarts_as_allowed(tmp_path, capfd):
    assert outcome(tmp_path, "kkkkk", restarts=2) == (137, 3)
    assert "all 2 restarts are used up" in capfd.readouterr().err


def test_the_same_step_twice_is_not_tried_a_third_time(tmp_path):
    with pytest.raises(TrainingHalted, match=r"step 7 .*as it did before: a deterministic failure"):
        outcome(tmp_path, "fKFd")
    assert (tmp_path / "starts").read_text() == "3"


FAMILY = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
Path(sys.argv[1], "child").write_text(str(child.pid))
sys.exit(1) if len(sys.argv) > 2 else time.sleep(100)
"""


def test_no_process_of_a_failed_start_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tbf.train.supervisor._GRACE_S", 0.3)
    assert supervise([sys.executable, "-c", FAMILY, str(tmp_path), "fail"], tmp_path, 0, 0.0) == 1
    assert not psutil.pid_exists(int((tmp_path / "child").read_text())) or (
        psutil.Process(int((tmp_path / "child").read_text())).status() == psutil.STATUS_ZOMBIE
    )


def test_a_signal_reaches_the_whole_family_and_nothing_is_started_again(tmp_path):
    program = f"""
import sys
from pathlib import Path
from tbf.train.supervisor import supervise
sys.exit(supervise([sys.executable, "-c", {FAMILY!r}, {str(tmp_path)!r}], Path({str(tmp_path)!r}), 3, 0.0))
"""
    supervisor = subprocess.Popen([sys.executable, "-c", program], env=environment(PYTHONPATH=str(ROOT)))
    deadline = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait(60) == 143
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_the_command_it_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py"])
    given = ["--auto-restart", "3", "--launcher=x", "--restart-pause", "5s", "--run-dir", "r", "--set", "a.b=1"]
    program = str(Path("launch/train.py").resolve())
    assert supervised_command(given, "torchrun --nproc_per_node 2") == [
        "torchrun", "--nproc_per_node", "2", program, "--run-dir", "r", "--set", "a.b=1",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--launcher is empty"):
        supervised_command(given, "")
