"""Builds the C++ kernels of ternary compute once per machine and loads them.

They are plain C functions without torch headers, so the system compiler takes seconds and no build tool is needed. The
result lies in the user's cache under a key of everything it depends on: sources, compiler, flags and processor
(`-march=native` code dies on another one). A build runs under an flock, which ends with its process however it dies,
and appears under its final name only when complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tbf.system import cache_root, processor

SOURCES = ("ternary_cpu.cpp", "ternary_gemm.h", "ternary_amx.h")
"""Of the kernels of training: the file to compile, then what it includes."""
FOLDER = Path(__file__).parent / "csrc"
# NaN must behave and no product may be fused with a sum: results are compared bit by bit with eager torch.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-Wno-maybe-uninitialized"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fwrapv"),
]

log = logging.getLogger(__name__)


class BuildError(Exception):
    """No compiler, or one that can't build the kernels."""


@functools.lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be built: said once, with the reason."""
    try:
        return ctypes.CDLL(str(build(cache_folder())))
    except (BuildError, OSError) as error:
        log.warning("ternary kernels: %s; going on with slower eager torch (install g++, or set CXX)", error)
        return None


def cache_folder() -> Path:
    """Where compiled kernels and probe results are kept: the user's cache, or a fresh folder if it can't be written."""
    folder = cache_root() / "ternary"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _private_folder()


@functools.lru_cache(maxsize=1)
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="tbf-ternary-"))


def build(folder: Path, sources: Sequence[str] = SOURCES) -> Path:
    """Returns the library of `sources`, building it if `folder` doesn't hold it yet. Raises BuildError."""
    compiler = find_compiler()
    openmp = loaded_openmp()
    target = folder / f"{Path(sources[0]).stem.partition('_')[0]}-{library_key(compiler, openmp, sources)}.so"
    if target.exists():
        return target
    with exclusive(target.with_suffix(".lock")):
        if not target.exists():
            log.info("compiling %s for this processor, once", sources[0])
            _compile(compiler, openmp, target, sources[0])
    return target


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX, or the first of g++, clang++ and c++ on PATH. Raises BuildError."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)})")


def loaded_openmp() -> str | None:
    """The OpenMP library that torch has loaded: a second one would bring a second set of spinning threads.

    Other packages may have loaded their own, so the one beside torch goes first.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split()[-1] for line in lines if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
    beside = str(Path(torch.__file__).parent)
    return min(paths, key=lambda path: (not path.startswith(beside), path), default=None)


def source_hash(sources: Sequence[str] = SOURCES) -> str:
    """Identifies this version of the C++ kernels."""
    digest = hashlib.sha256()
    for name in sources:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def library_key(compiler: list[str], openmp: str | None, sources: Sequence[str] = SOURCES) -> str:
    """Names a build by all it depends on."""
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler[0]} doesn't run ({error})") from error
    parts = (source_hash(sources), shlex.join(compiler), version, " ".join(FLAGS), processor(), str(openmp))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(compiler: list[str], openmp: str | None, target: Path, source: str) -> None:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    attempts = [
        (["-fopenmp", native], [openmp] if openmp else ["-fopenmp"]),
        (["-fopenmp", native], ["-fopenmp"]),
        ([native], []),  # one thread is better than eager torch
    ]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        obj, library = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        for compile_flags, link_flags in attempts:
            commands = (
                [*compiler, *FLAGS, *compile_flags, "-c", str(FOLDER / source), "-o", str(obj)],
                [*compiler, "-shared", str(obj), *link_flags, "-o", str(library)],
            )
            error = next((e for e in map(_run, commands) if e), None)
            if error is None:
                library.replace(target)
                return
    raise BuildError(f"{compiler[0]} can't build them ({error})")


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    return lines[0].strip()


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock on `path` that ends with the process; goes on without it where the file system has none."""
    with path.open("w") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
