"""Builds DeepSpeed's host operators once per machine, so that no run meets a compiler, or a dead build's lock, midway.

    python -m tbf.train.build_ops

The cache is keyed by torch, DeepSpeed, environment and processor (`-march=native` code crashes on another one). A
build that was killed leaves torch's `lock` file behind, on which every later run would wait for ever; ours is an flock,
which dies with its process, and whoever holds it may delete the stale one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tbf.errors import HardwareError, run_program
from tbf.system import cache_root, processor

CPU_ADAM, SHARED_MEMORY_COMM, ASYNC_IO = "CPUAdamBuilder", "ShareMemCommBuilder", "AsyncIOBuilder"


def extensions_dir() -> Path:
    """The cache folder of compiled operators; TORCH_EXTENSIONS_DIR overrides it."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    # Where the sources lie is part of the key: two environments that shared a folder would rebuild it in turns.
    sources = [f"{name}{version(name)}" for name in ("torch", "deepspeed")] + [sys.prefix, sys.version, processor()]
    return cache_root() / "torch_extensions" / hashlib.sha256("\n".join(sources).encode()).hexdigest()[:16]


def prepare_ops(needs_cpu_adam: bool, say=print, *, needs_async_io: bool = False) -> bool:
    """Builds or loads what this run needs. Returns whether the fused host Adam is usable.

    Every local rank calls it before the process group starts; the first one in builds while the others wait. Raises
    HardwareError when NVMe offload is asked for and its operator can't be built: nothing stands in for it.
    """
    directory = extensions_dir()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
    _put_ninja_on_path()
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    with _exclusive(directory / "tbf-build.flock"):
        for stale in directory.glob("*/lock"):
            stale.unlink()
        adam = not needs_cpu_adam or _build(CPU_ADAM, compiler, say)
        if os.environ.get("DS_ACCELERATOR") == "cpu" and not _build(SHARED_MEMORY_COMM, compiler, say):
            _disable_shared_memory_comm()
        if needs_async_io:
            _require_async_io()
            if not _build(ASYNC_IO, compiler, say):
                raise HardwareError(
                    "offload to NVMe needs DeepSpeed's async_io operator, which could not be built here; install a C++ "
                    "compiler and libaio-dev, or offload to host RAM (p40_zero3.json)"
                )
    return adam


def _require_async_io() -> None:
    """Raises HardwareError when DeepSpeed's NVMe operator can't be built here."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(ASYNC_IO)
    with contextlib.redirect_stdout(io.StringIO()):
        usable = builder is not None and builder.is_compatible(verbose=False)
    if not usable:
        raise HardwareError(
            "offload to NVMe needs libaio with its headers, which this machine lacks; install libaio-dev "
            "(libaio-devel), or offload to host RAM (p40_zero3.json)"
        )


def _build(builder_name: str, compiler: str | None, say) -> bool:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    if compiler is None:
        say(f"{builder.NAME}: no C++ compiler found (install g++, or set CXX); going on without it")
        return False
    fresh = not list((extensions_dir() / builder.NAME).glob("*.so"))
    if fresh:
        say(f"building {builder.NAME} once for this machine (one to three minutes) ...")
    started = time.monotonic()
    try:
        # A file, not a StringIO: DeepSpeed looks for libaio with the descriptor of stderr in its hand.
        with tempfile.TemporaryFile("w+") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[-1]
        say(f"{builder.NAME}: the build failed ({reason}); going on without it")
        return False
    if fresh:
        say(f"built {builder.NAME} in {time.monotonic() - started:.0f} s")
    return True


def _disable_shared_memory_comm() -> None:
    """DeepSpeed's CPU backend loads this operator unconditionally when it thinks it can, and dies if it can't.

    Its public table of compatible operators is the only switch; without it gloo carries the collectives.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _put_ninja_on_path() -> None:
    """The ninja beside the interpreter comes first, also where ssh or a batch system gives another PATH.

    It is a dependency of ours. Another release finds its own log in the cache unreadable and would compile anew.
    """
    beside, path = Path(sys.executable).parent, os.environ.get("PATH", "")
    if (beside / "ninja").exists() and path.partition(os.pathsep)[0] != str(beside):
        os.environ["PATH"] = f"{beside}{os.pathsep}{path}"


def main() -> int:
    """Builds everything a first run would need; always leaves 0, since every operator has a slower stand-in."""
    from tbf.train.environment import choose_accelerator

    choose_accelerator()
    prepare_ops(needs_cpu_adam=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
