"""Runs of two ranks under real launchers: `deepspeed`, torchrun, and the supervisor above them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tbf.train.status import read_status
from tests.faults.tally import Tally
from tests.helpers.runs import DS_ZERO2, ROOT, command, environment, write_preset

TRAIN = str(ROOT / "launch" / "train.py")
LONG = {"max_steps": 100_000, "save_every": 5, "eval_every": 1000, "decay_share": 0.0}
LAUNCHERS = {"deepspeed": ["deepspeed", "--num_accelerators", "2", TRAIN], "torchrun": command(ranks=2)[:6]}
SUPERVISED = [sys.executable, TRAIN, "--auto-restart", "2", "--restart-pause", "1", "--launcher",
              "deepspeed --num_accelerators 2"]  # fmt: skip


class Launched:
    """A run that would take for ever."""

    def __init__(self, cache: Path, name: str, program: list[str], *more: str, **train: object) -> None:
        self.dir, self.log = cache / name, cache / f"{name}.log"
        preset = write_preset(cache, **{**LONG, "micro_batch_size": 2, **train})
        line = [*program, "--ds_config", str(DS_ZERO2), "--preset", str(preset), "--run-dir", str(self.dir), *more]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                line, cwd=cache, env=environment(), start_new_session=True, stdout=log, stderr=log
            )

    def wait_for_a_checkpoint(self) -> Launched:
        until(lambda: list((self.dir / "checkpoints").glob("step-*/manifest.json")), 240)
        return self

    def ranks(self) -> dict[str, int]:
        return {path.stem: json.loads(path.read_text())["pid"] for path in (self.dir / "heartbeats").glob("rank*.json")}

    def newest(self) -> int:
        return max(int(path.parent.name[5:]) for path in (self.dir / "checkpoints").glob("step-*/manifest.json"))

    def end(self) -> str:
        """Ends what is left, ranks in sessions of their own too (torchrun's); returns what was printed last."""
        left = [process for process in psutil.process_iter() if _group(process.pid) == self.process.pid]
        mine = [psutil.Process(pid) for pid in self.ranks().values() if psutil.pid_exists(pid)]
        for process in [*left, *mine]:
            with contextlib.suppress(psutil.Error):
                if process in left or str(self.dir) in process.cmdline():
                    process.kill()
        self.process.wait(60)
        return self.log.read_text(errors="replace")[-3000:]


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_launcher(cache: Path, launcher: str, number: int, who: str = "launcher") -> float:
    """A signal to the launcher, or to the launch.py below it: all ranks save and leave. Returns the seconds it took."""
    run = Launched(cache, f"{launcher}-{who}-{int(number)}", LAUNCHERS[launcher])
    try:
        ranks = run.wait_for_a_checkpoint().ranks()
        assert len(ranks) == 2
        target = run.process.pid if who == "launcher" else psutil.Process(ranks["rank0"]).ppid()
        os.kill(target, number)
        started = time.monotonic()
        until(lambda: all(gone(pid) for pid in ranks.values()), 90)
        status = read_status(run.dir)
        assert (status["state"], status["step"]) == ("stopped", run.newest()), status
        return time.monotonic() - started
    finally:
        print(run.end())


def lose_rank(cache: Path, number: int) -> float:
    """A rank is killed or stopped: the other names it and leaves. Returns the seconds it took."""
    run = Launched(cache, f"rank-{int(number)}", LAUNCHERS["torchrun"], "--set", "train.stall_timeout_s=5")
    try:
        ranks = run.wait_for_a_checkpoint().ranks()
        os.kill(ranks["rank1"], number)
        started = time.monotonic()
        until(lambda: gone(ranks["rank0"]), 90)
        seconds = time.monotonic() - started
        status = read_status(run.dir)
        assert status["state"] == "failed" and "rank 1 (pid" in status["reason"], status
        return seconds
    finally:
        print(run.end())


def restart(cache: Path) -> float:
    """A rank is killed under the supervisor: the run is started again and gets on. Returns the seconds it took."""
    run = Launched(cache, "supervised", SUPERVISED).wait_for_a_checkpoint()
    try:
        first, ranks = run.newest(), run.ranks()
        os.kill(ranks["rank1"], signal.SIGKILL)
        started = time.monotonic()
        until(lambda: not set(run.ranks().values()) & set(ranks.values()) and run.newest() > first + 5, 240)
        seconds = time.monotonic() - started
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(120) == 143
        assert read_status(run.dir)["state"] == "stopped"
        return seconds
    finally:
        print(run.end())


def launched_faults(cache: Path) -> list[Tally]:
    """Every fault of this file once, as rows of the table."""
    saved, named = "no orphan, nothing lost, status tells", "named by the other rank"
    cases: list[tuple[str, str, Callable[[], float]]] = [
        ("SIGTERM to `deepspeed`", saved, lambda: end_launcher(cache, "deepspeed", signal.SIGTERM)),
        ("kill -9 of `deepspeed`", saved, lambda: end_launcher(cache, "deepspeed", signal.SIGKILL)),
        ("kill -9 of launch.py", saved, lambda: end_launcher(cache, "deepspeed", signal.SIGKILL, "launch.py")),
        ("SIGTERM to torchrun", saved, lambda: end_launcher(cache, "torchrun", signal.SIGTERM)),
        ("kill -9 of torchrun", saved, lambda: end_launcher(cache, "torchrun", signal.SIGKILL)),
        ("kill -9 of a rank under torchrun", named, lambda: lose_rank(cache, signal.SIGKILL)),
        ("SIGSTOP of a rank under torchrun", named, lambda: lose_rank(cache, signal.SIGSTOP)),
        ("kill -9 of a rank under --auto-restart", "started again, gets on", lambda: restart(cache)),
    ]
    rows = []
    for fault, expected, case in cases:
        row = Tally(fault, expected, lost=0 if expected == saved else None)
        try:
            row.record(seconds=case())
        except (AssertionError, psutil.Error, OSError, subprocess.SubprocessError) as error:
            row.record(f"{type(error).__name__}: {error}")
        rows.append(row)
    return rows
