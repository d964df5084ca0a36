"""run_status.json: what became of a run, whatever the exit code of the launcher says."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from tbf.checkpoints.files import to_json, write_atomic
from tbf.errors import CheckpointError

STATUS_NAME = "run_status.json"
STATES = ("running", "done", "stopped", "halted", "failed")
HEARTBEAT_S = 10.0


class RunStatus:
    """Writes a run's status; for rank 0 alone. Each write replaces the file in one step."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / STATUS_NAME
        self._process = {"pid": os.getpid(), "pid_started": psutil.Process().create_time()}
        self._next_beat = 0.0

    def write(self, state: str, step: int, **details: Any) -> None:
        """Records a state, one of STATES, at an optimizer step; `details` are added as they are."""
        if state not in STATES:
            raise ValueError(f"'{state}' is no run state; one of {', '.join(STATES)}")
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        status = {"state": state, "step": step, **self._process, "host": socket.gethostname(), "time": now, **details}
        write_atomic(self.path, to_json(status))
        self._next_beat = time.monotonic() + HEARTBEAT_S

    def heartbeat(self, step: int) -> None:
        """Records that the run goes on; at most every ten seconds, so that it can be called each step."""
        if time.monotonic() >= self._next_beat:
            self.write("running", step)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Returns the status of a run; "killed" instead of "running" when its process is gone.

    A process on another machine cannot be looked at: there "running" is taken at its word, see `time`. Raises
    CheckpointError when the folder has no readable status.
    """
    path = run_dir / STATUS_NAME
    try:
        status = json.loads(path.read_bytes())
        if status["state"] == "running" and status["host"] == socket.gethostname() and not _alive(status):
            status["state"] = "killed"
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir} has no {STATUS_NAME}; is it the folder of a run?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); a resumed run writes it anew") from None
    return status


def _alive(status: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(status["pid"])
        return abs(process.create_time() - status["pid_started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
