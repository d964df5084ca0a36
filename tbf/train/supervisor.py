"""Starts a run again when it fails: `python launch/train.py --auto-restart N --run-dir DIR ...`.

Stands above the launcher, since no exit code below can be trusted: `deepspeed` reports success when launch.py was
killed. What became of the run is read from its run_status.json. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from tbf.errors import CheckpointError, ConfigError, TrainingHalted
from tbf.train.status import read_status
from tbf.train.watchdog import last_step

_FINAL = (2, 3, 6)  # wrong configuration, unusable data, halted: the same again would end the same
_LONGEST_PAUSE_S = 300.0
_GRACE_S = 60.0  # that what is left of a failed start has to end by itself


def supervise(program: Sequence[str], run_dir: Path, restarts: int, pause_s: float) -> int:
    """Runs `program` until its run is finished or stopped; returns the exit code to leave with.

    A failed run is started again, up to `restarts` times, after a pause that doubles each time (up to five minutes).
    Raises TrainingHalted when it failed twice at the same step, which no restart will cure.
    """
    failed_at: int | None = None
    for attempt in range(restarts + 1):
        before = _outcome(run_dir)
        code, signalled = _run(program)
        state, reason, _ = now = _outcome(run_dir)
        if now == before and code not in (0, *_FINAL):  # e.g. a machine that cannot be reached: may pass
            state, reason = "never started", "the launcher's own output says why"
        if state in ("done", "stopped") or code in _FINAL:
            return code
        if signalled:  # pdsh may end the ranks before they say "stopped"
            _say(
                f"stopped by {signal.Signals(signalled).name} ({state}); its checkpoints are kept, nothing is restarted"
            )
            return 128 + signalled
        step = last_step(run_dir)
        what = f"the run failed at step {step} (exit code {code}, {state}{': ' if reason else ''}{reason})"
        if step == failed_at and state != "never started":
            raise TrainingHalted(
                f"{what}, as it did before: a deterministic failure, so it is not started again. See the messages "
                f"above and {run_dir}/train.log"
            )
        if attempt == restarts:
            break
        failed_at = step
        pause = min(pause_s * 2**attempt, _LONGEST_PAUSE_S)
        _say(f"{what}; restart {attempt + 1} of {restarts} in {pause:.0f} s, from the last good checkpoint")
        time.sleep(pause)
    _say(f"{what}; all {restarts} restarts are used up")
    return code or 1


def supervised_command(arguments: Sequence[str], launcher: str) -> list[str]:
    """The command line that the supervisor runs: the launcher, this program, its arguments without the supervisor's."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--auto-restart", "--launcher", "--restart-pause"):
            skip = True
        elif not argument.startswith(("--auto-restart=", "--launcher=", "--restart-pause=")):
            kept.append(argument)
    program = str(Path(sys.argv[0]).resolve())
    words = shlex.split(launcher)
    if not words:
        raise ConfigError("--launcher is empty; give e.g. 'deepspeed', 'torchrun --nproc_per_node 2' or 'python'")
    return [*words, program, *kept]


def _run(program: Sequence[str]) -> tuple[int, int]:
    """Runs the command in a process group of its own, passes signals on, and leaves no process of it behind.

    Returns its exit code and the first signal that was to end it, 0 for none.
    """
    # pdsh's ssh would wait for ever for a machine that lost its power or its network.
    env = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=10 -o ServerAliveCountMax=3", **os.environ}
    child = subprocess.Popen(program, start_new_session=True, env=env)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        code = child.wait()
        _end_group(child.pid, patience=_GRACE_S)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), (received[0] if received else 0)


def _end_group(group: int, patience: float) -> None:
    """Waits for the rest of a process group, then ends it: a second start must not meet the first one's ranks."""
    deadline = time.monotonic() + patience
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
        while _members(group):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        else:
            return
        deadline = time.monotonic() + patience


def _members(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error, PermissionError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                found.append(process.pid)
    return found


def _outcome(run_dir: Path) -> tuple[str, str, object]:
    """State, reason, and which start they are of."""
    try:
        status = read_status(run_dir)
    except CheckpointError as error:
        return "never started", str(error), None
    return status["state"], str(status.get("reason", "")), (status.get("pid_started"), status.get("time"))


def _say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
