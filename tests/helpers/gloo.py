"""Runs a function on several CPU ranks that talk through gloo, each in a fresh process."""

from __future__ import annotations

import contextlib
import ctypes.util
import datetime
import faulthandler
import importlib.util
import inspect
import logging
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

needs_libaio = pytest.mark.skipif(
    ctypes.util.find_library("aio") is None, reason="libaio is not installed (apt install libaio-dev)"
)
GRACE_S = 5.0  # that the other ranks have to report the failure of the first one


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on every rank, inside a process group; returns the results in rank order.

    `fn` is a module-level function; arguments and results are picklable. The ranks load its file by path, whatever
    the test runner called the module, and meet through a file, so no port can be taken. Raises RuntimeError with the
    traceback of the rank that failed first, or with every rank's stack when the time is up.
    """
    context = multiprocessing.get_context("spawn")
    deadline = time.time() + timeout_s
    with tempfile.TemporaryDirectory(prefix="tbf-gloo-") as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank_main, args=(_where(fn), rank, world_size, args, folder, deadline))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder, deadline)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]


def deepspeed_on_gloo() -> Any:
    """Returns the deepspeed module, quiet, and without the operator that it would compile for CPU collectives."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _wait(processes: list[BaseProcess], folder: Path, deadline: float) -> None:
    while any(process.is_alive() for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed:
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until and any(process.is_alive() for process in processes):
                time.sleep(0.05)
            break
        if time.time() > deadline:
            stacks = "\n".join(path.read_text() for path in sorted(folder.glob("stack*")))
            raise RuntimeError(f"the ranks did not finish in time:\n{stacks}")
        time.sleep(0.05)
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        codes = [process.exitcode for process in processes]
        texts = "\n".join(f"{path.name.replace('error', 'rank ')}:\n{path.read_text()}" for path in errors)
        raise RuntimeError(f"ranks failed, the first one first (exit codes {codes}):\n{texts}")
    dead = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    if dead:
        raise RuntimeError(f"ranks died without a Python error, exit codes {dead} (negative: killed by that signal)")


def _where(fn: Callable[..., Any]) -> tuple[str, str]:
    return inspect.getfile(fn), fn.__name__


def _load(path: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return getattr(module, name)


def _rank_main(
    fn: tuple[str, str], rank: int, world_size: int, args: tuple[Any, ...], folder: Path, deadline: float
) -> None:
    # DeepSpeed reads these even when it joins a group that exists; the port only has to look like one.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with (folder / f"stack{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(max(deadline - time.time() - 2.0, 0.1), file=stack)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=max(deadline - time.time(), 1.0)),
            )
            result = _load(*fn)(rank, world_size, *args)
            (folder / f"result{rank}").write_bytes(pickle.dumps(result))
            dist.barrier()  # a rank that left first would break its peers' last collectives
        except BaseException:
            (folder / f"error{rank}").write_text(traceback.format_exc())
            os._exit(1)  # without waiting for peers that may hang in a collective
        finally:
            faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still hold tensors; freeing them without an interpreter would abort the process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
