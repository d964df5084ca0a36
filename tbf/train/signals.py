"""Requests to stop: SIGTERM, SIGINT, SIGUSR1, a file named STOP in the run folder, a time limit, a dead launcher.

A handler only takes a note; the trainer asks after each step, agrees with the other ranks, saves and leaves.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import socket
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from tbf.train.launcher_watch import LauncherWatch

logger = logging.getLogger(__name__)

STOP_FILE = "STOP"
_EXIT_CODES = {signal.SIGUSR1: 0, signal.SIGTERM: 143, signal.SIGINT: 130}
_DIGITS = {0: 1, 143: 1 << 16, 130: 1 << 32}  # of `requested`: one counter for each exit code, 65,535 ranks each
_SAME_PRESS_S = 1.0  # a launcher and a terminal both pass on one Ctrl-C
_LOOK_EVERY_S = 1.0


class StopRequest:
    """Takes note of stop requests between `with` and its end, and puts the old handlers back.

    A second SIGINT leaves at once, even from inside a collective that never returns.
    """

    def __init__(self, run_dir: Path, max_seconds: float | None = None) -> None:
        """`max_seconds` counts from the start of this process."""
        self.agreed = False
        """Whether all ranks know; set by `agree`, or by the trainer."""
        self._stop_file = Path(run_dir) / STOP_FILE
        self._launcher = LauncherWatch()
        already = time.time() - psutil.Process().create_time()
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds - already
        self._next_look = 0.0
        self._exit_code: int | None = None
        self._agreed_code: int | None = None
        self._old_handlers: dict[int, Any] = {}
        self._interrupted_at: float | None = None

    @property
    def requested(self) -> int:
        """0, or a number that says how this rank was asked to stop; the sum over all ranks goes to `agree`."""
        if self._exit_code is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_EVERY_S
            if self._stop_file.exists():
                self.request(f"found {self._stop_file}", exit_code=0)
            elif time.monotonic() >= self._deadline:
                self.request("the time limit (--max-time) is reached", exit_code=0)
            elif gone := self._launcher.gone():
                self.request(gone, exit_code=143)
        return 0 if self._exit_code is None else _DIGITS[self._exit_code]

    def request(self, reason: str, exit_code: int = 0) -> None:
        """Asks to stop after the current step; the first reason counts. `exit_code` is 0, 130 or 143."""
        if self._exit_code is None:
            self._exit_code = exit_code
            logger.warning("%s: stopping after this step, with a checkpoint", reason)

    def agree(self, total: float) -> bool:
        """Takes the sum of `requested` over all ranks: stop if any was asked, all with the same exit code."""
        codes = [code for code, digit in _DIGITS.items() if int(total) // digit % (1 << 16)]
        if codes:
            self.agreed, self._agreed_code = True, codes[-1]
        return self.agreed

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, else 143 for SIGTERM, else 0 (SIGUSR1, STOP file)."""
        if self._agreed_code is not None:
            return self._agreed_code
        return 143 if self._exit_code is None else self._exit_code

    def __enter__(self) -> StopRequest:
        if self._stop_file.exists():
            logger.warning("removing %s, left from an earlier run", self._stop_file)
            self._stop_file.unlink(missing_ok=True)
        # Python runs its handlers between two bytecodes only, so not while the main thread waits in a collective.
        # The wake-up socket is written by the signal itself.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._note) for number in _EXIT_CODES}
        self._thread = threading.Thread(target=self._watch, name="tbf-signals", daemon=True)
        self._thread.start()
        _installed.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._uninstall()
        # Ends the watching thread. Closing would not: a forked data worker still holds the socket.
        self._writer.shutdown(socket.SHUT_WR)
        self._writer.close()
        self._thread.join()
        self._reader.close()
        if self.agreed:
            self._stop_file.unlink(missing_ok=True)

    def _uninstall(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}
        signal.set_wakeup_fd(self._old_wakeup)
        _installed.discard(self)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name, _EXIT_CODES[number])

    def _watch(self) -> None:
        while received := self._reader.recv(1):
            if received[0] != signal.SIGINT:
                continue
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
                os.write(2, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to leave at once\n")
            elif now - self._interrupted_at > _SAME_PRESS_S:
                os.write(2, b"\nleaving at once, without a checkpoint\n")
                os._exit(130)


def duration(text: str) -> float:
    """Seconds in "90", "90s", "15m", "3h30m" or "2d"; a type for argparse. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no duration; write seconds, or e.g. 45m, 3h30m, 2d")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


_installed: weakref.WeakSet[StopRequest] = weakref.WeakSet()
_masks: list[set[int]] = []


def _before_fork() -> None:
    """Holds signals back over a fork, so that a child ended at birth meets its own handlers, not its parent's."""
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, _EXIT_CODES if _installed else ()))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _after_fork_in_child() -> None:
    """A forked worker must not pass on its own signals (its end is a SIGTERM) as if its parent had got them."""
    for request in list(_installed):
        request._uninstall()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
