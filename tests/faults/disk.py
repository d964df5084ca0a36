"""A file layer with faults: it sees every change that this process makes below a folder, and fails at the n-th.

A change is an opening for writing, a rename, a deletion, a new folder, a sync, or a write of a checkpoint file.
Python's audit hooks see all but the last two, whoever makes them. They cannot be taken back: for processes about to
end only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tbf.checkpoints.files import DurableFile

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def watch(folder: Path, act: Callable[[int], None]) -> None:
    """Calls `act` with 0, 1, 2, ... before each change below `folder` from now on."""
    root, count, own = str(folder), -1, os.getpid()

    def change() -> None:
        nonlocal count
        if os.getpid() == own:
            count += 1
            act(count)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITING and _below(root, path):
                change()
        elif event in _CHANGES and (_below(root, args[0]) or args[-1] != -1):  # a deletion of trees names its folder
            change()

    sync, write = os.fsync, DurableFile.write

    def counted_sync(handle: int) -> None:
        change()
        sync(handle)

    def counted_write(handle: DurableFile, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        written = write(handle, view[:half])  # what a process that dies in the middle of a write leaves
        handle.flush()
        try:
            change()
        except OSError as error:
            handle.error = error
            raise
        return written + write(handle, view[half:])

    os.fsync, DurableFile.write = counted_sync, counted_write
    sys.addaudithook(hook)


def die_at(number: int) -> Callable[[int], None]:
    """kill -9 at one change."""

    def act(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def full_from(number: int) -> Callable[[int], None]:
    """From one change on the disk is full, as a program sees it."""

    def act(count: int) -> None:
        if count >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def fill_at(number: int, filler: Path) -> Callable[[int], None]:
    """At one change the file system of `filler` becomes full, down to the last byte."""

    def act(count: int) -> None:
        if count == number:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                block = bytes(1 << 20)
                while True:
                    file.write(block)

    return act


def _below(root: str, path: Any) -> bool:
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root)
