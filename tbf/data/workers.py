"""A few processes that work through jobs handed out one by one.

Forked, so that a job may be any closure; they touch no torch and no GPU. They ignore Ctrl-C (the parent decides) and
the kernel ends them with their parent, even when that one is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tbf.errors import DataError, TbfError

Job = TypeVar("Job")
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def run_jobs(
    jobs: Iterator[Job],
    work: Callable[[Job, Callable[[Any], None]], Any],
    *,
    processes: int,
    on_progress: Callable[[Any], None] = lambda _: None,
) -> Iterator[tuple[Job, Any]]:
    """Yields (job, result) in the order in which jobs finish; the next job is taken only when a process is free.

    Args:
        work: called as `work(job, report)`; what it passes to `report` reaches `on_progress` here.
        processes: below 2, everything runs in this process.

    Raises:
        TbfError: as raised by `work`; DataError when a process died.
    """
    if processes < 2:
        for job in jobs:
            yield job, work(job, on_progress)
        return
    context = multiprocessing.get_context("fork")
    busy: dict[Any, tuple[Any, Any]] = {}  # connection -> (process, job)
    idle: list[tuple[Any, Any]] = []  # (connection, process)
    try:
        exhausted = False
        while True:
            while not exhausted and len(busy) < processes:
                try:
                    job = next(jobs)
                except StopIteration:
                    exhausted = True
                    break
                if idle:
                    connection, process = idle.pop()
                else:
                    connection, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
                    process.start()
                    theirs.close()
                busy[connection] = (process, job)
                connection.send(job)
            if not busy:
                return
            for connection in multiprocessing.connection.wait(list(busy)):
                process, job = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise DataError(
                        f"a worker process died (exit {process.exitcode}; -9 is often lack of memory); run the same "
                        "command again with fewer workers: it goes on where it stopped"
                    ) from None
                if kind == "progress":
                    on_progress(value)
                elif kind == "error":
                    raise value
                else:
                    del busy[connection]
                    idle.append((connection, process))
                    yield job, value
    finally:
        for connection, process in [*idle, *((c, p) for c, (p, _) in busy.items())]:
            process.kill()
            process.join()
            connection.close()


def _serve(connection: Any, work: Callable[[Any, Callable[[Any], None]], Any], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)
    gc.disable()  # millions of short-lived strings and no cycles: a sixth of the time would go into looking for some
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            job = connection.recv()
            try:
                result = work(job, lambda value: connection.send(("progress", value)))
            except TbfError as error:
                connection.send(("error", error))
            except Exception:
                connection.send(("error", RuntimeError(traceback.format_exc())))
            else:
                connection.send(("done", result))


def end_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent ends (Linux; elsewhere a no-op)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
