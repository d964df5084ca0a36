"""Finds out that a rank is dead or stuck, names it, and ends this one instead of letting it hang.

Every rank keeps a file in `heartbeats/` of the run folder, written by a thread: it counts on while the process lives,
and carries the place that the training thread last reached. The thread also reads the others' files. What counts is
whether a file changed since it was last looked at, on this machine's own monotonic clock: no clock is compared.
Machines that share no run folder send each other the same over the network (`heartbeat_link`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tbf.errors import CheckpointError, EngineError, first_line
from tbf.train.heartbeat_link import HeartbeatLink
from tbf.train.status import RunStatus, read_status

logger = logging.getLogger(__name__)

FOLDER = "heartbeats"


@dataclass
class _Seen:
    """A rank as its file showed it, and since when (monotonic seconds)."""

    beat: int = -1
    place: int = -1
    step: int = 0
    host: str = ""
    pid: int = 0
    left: bool = False
    beat_at: float = 0.0
    place_at: float = 0.0


class Watchdog:
    """Watches the ranks of a run between `with` and its end.

    The training thread calls `here` at every place it reaches; that only counts up a number. When a rank's process
    gives no sign for `timeout` seconds, or no rank moves for that long, the thread writes every stack of this process
    and what it found, and ends the process with EngineError's exit code; `timeout` 0 watches nothing.
    """

    def __init__(
        self, run_dir: Path, rank: int, world_size: int, timeout: float, link: HeartbeatLink | None = None
    ) -> None:
        """`link` carries the beats where the machines share no folder; it is closed with the watchdog."""
        self.run_dir, self.rank, self.world_size, self.timeout = run_dir, rank, world_size, timeout
        self.link = link
        self._table: dict[int, dict[str, Any]] = {}
        self.interval = min(max(timeout / 10, 0.1), 5.0)
        self.step = 0
        self._places = 0
        self._beats = 0
        self._others = {other: _Seen() for other in range(world_size) if other != rank}
        self._own_place, self._own_place_at = -1, time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._leave: Callable[[int], Any] = os._exit

    def here(self, step: int) -> None:
        """The training thread is alive and has taken `step` steps."""
        self.step = step
        self._places += 1

    def __enter__(self) -> Watchdog:
        if self.timeout > 0:
            try:
                (self.run_dir / FOLDER).mkdir(exist_ok=True)
                self._write()
            except OSError as error:
                raise CheckpointError(
                    f"{self.run_dir / FOLDER}: cannot be written to ({error.strerror}); see to room and permissions, "
                    "then start again"
                ) from error
            now = time.monotonic()
            self._own_place_at = now
            for seen in self._others.values():
                seen.beat_at = seen.place_at = now
            self._thread = threading.Thread(target=self._watch, name="tbf-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                self._write(left=True)
        if self.link is not None:
            self.link.close()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns the error of a broken collective into EngineError that names the rank which left first.

        An error for which no other rank is to blame passes as it is.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or self.timeout == 0 or not _of_a_collective(error):
                raise
            gone = self._who_left(min(self.timeout, 10 * self.interval))
            if gone is None:
                raise
            first = first_line(error)[:160]
            raise EngineError(f"{gone}; its own output says why. This rank {self.rank} lost the connection ({first})"
                              ) from error  # fmt: skip

    def _who_left(self, patience: float) -> str | None:
        until = time.monotonic() + patience
        while True:
            self._look()
            for other, seen in self._others.items():
                if seen.pid and seen.host == socket.gethostname() and _ended(seen.pid):
                    return f"rank {other} (pid {seen.pid} on {seen.host}) has ended at step {seen.step}"
            silent = self._silent(min(self.timeout, 5 * self.interval))
            if silent:
                return silent
            if time.monotonic() > until:
                return None
            time.sleep(self.interval)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._write()
                self._look()
            except OSError as error:
                logger.warning("the watchdog cannot use %s: %s", self.run_dir / FOLDER, error)
                continue
            problem = self._silent(self.timeout) or self._stalled()
            if problem:
                self._give_up(problem)
                return

    def _look(self) -> None:
        now = time.monotonic()
        if self._own_place != self._places:
            self._own_place, self._own_place_at = self._places, now
        for other, seen in self._others.items():
            with contextlib.suppress(OSError, ValueError, KeyError):
                found = self._table[other] if self.link else json.loads(self._file(other).read_bytes())
                if found["beat"] != seen.beat:
                    seen.beat, seen.beat_at = found["beat"], now
                if found["place"] != seen.place:
                    seen.place, seen.place_at = found["place"], now
                seen.step, seen.host, seen.pid, seen.left = found["step"], found["host"], found["pid"], found["left"]

    def _silent(self, patience: float) -> str | None:
        """The rank whose process has given no sign for the longest time."""
        now = time.monotonic()
        silent = [(now - seen.beat_at, other) for other, seen in self._others.items() if not seen.left]
        longest, other = max(silent, default=(0.0, -1))
        if longest <= patience:
            return None
        if self.link is not None and not self.link.connected:
            other = 0  # all news comes through rank 0
        seen = self._others[other]
        where = f"pid {seen.pid} on {seen.host}, at step {seen.step}" if seen.pid else "which never started to train"
        how = "dead or stopped, or the network to it is down" if self.link else "dead or stopped"
        return f"rank {other} ({where}) is {how}: no sign of it for {longest:.0f} s"

    def _stalled(self) -> str | None:
        """All processes live, yet no training thread moves: the one that stands furthest back holds up the others."""
        now = time.monotonic()
        standing = {other: (seen.place, now - seen.place_at) for other, seen in self._others.items() if not seen.left}
        standing[self.rank] = (self._places, now - self._own_place_at)
        if min(since for _, since in standing.values()) <= self.timeout:
            return None
        behind = min(place for place, _ in standing.values())
        last = sorted(rank for rank, (place, _) in standing.items() if place == behind)
        who = f"rank {last[0]} is" if len(last) == 1 else f"ranks {', '.join(map(str, last))} are"
        return f"no rank has moved for {self.timeout:.0f} s at step {self.step}; {who} the furthest back"

    def _give_up(self, problem: str) -> None:
        stacks = self.run_dir / FOLDER / f"stacks_rank{self.rank}.txt"
        with contextlib.suppress(OSError), stacks.open("w") as handle:
            faulthandler.dump_traceback(file=handle)
        text = f"rank {self.rank} gives up: {problem}. Stacks of this rank are in {stacks}; the run can be resumed"
        with contextlib.suppress(OSError, EngineError):
            logger.error("%s", text)
            self._write_status(problem)
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._leave(EngineError.exit_code)

    def _write_status(self, problem: str) -> None:
        """The lowest rank that lives writes it: rank 0 may be the one that does not."""
        living = [other for other, seen in self._others.items() if time.monotonic() - seen.beat_at <= self.timeout]
        if self.rank == min([*living, self.rank]):
            with contextlib.suppress(Exception):
                if read_status(self.run_dir)["state"] in ("done", "stopped", "halted"):
                    return
            RunStatus(self.run_dir).write("failed", self.step, reason=problem)

    def _write(self, left: bool = False) -> None:
        self._beats += 1
        beat = {
            "rank": self.rank,
            "beat": self._beats,
            "place": self._places,
            "step": self.step,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "left": left,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        temporary = self._file(self.rank).with_suffix(".tmp")  # no sync: it is worth nothing after a power cut
        temporary.write_text(json.dumps(beat), encoding="utf-8")
        temporary.replace(self._file(self.rank))
        if self.link is not None:
            self._table = self.link.exchange(beat, limit=min(self.interval, 2.0))

    def _file(self, rank: int) -> Path:
        return self.run_dir / FOLDER / f"rank{rank}.json"


def _ended(pid: int) -> bool:
    """A process that nobody has waited for yet has ended too."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _of_a_collective(error: RuntimeError) -> bool:
    """Whether another rank may be to blame. Gloo's errors are plain RuntimeErrors; one out of memory is this rank's own
    and must not wait here while the others wonder.
    """
    return (
        type(error).__name__.startswith("Dist")
        or re.search("gloo|nccl|connection|socket", str(error), re.I) is not None
    )


def last_step(run_dir: Path) -> int:
    """The furthest step that any rank of the last start reported; 0 where none did."""
    steps = [0]
    for path in (run_dir / FOLDER).glob("rank*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            steps.append(int(json.loads(path.read_bytes())["step"]))
    return max(steps)
