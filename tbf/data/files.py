"""Small file helpers: atomic writes, hashes and a lock that tells people what it waits for."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tbf.errors import DataError
from tbf.system import sync_folder

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError raised while writing near `path` into a DataError that names the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"{path}: no room left to write ({error.strerror}); free some space or name another folder, "
                "then run the same command again: it goes on where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"{path}: cannot write ({error.strerror}); name a folder that you may write to") from error
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            raise DataError(f"{path}: a file stands where a folder is needed; name another folder") from error
        raise


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents. Raises DataError where that is not allowed."""
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file aside, flushes it to the disk and renames it, so that a reader sees all of it or nothing.

    `durable=False` leaves the flushing of the rename to the caller (`sync_folder`), for many files in a row.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with write_errors(path):
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Removes what killed calls of `write_bytes` left in a folder; for who holds its lock."""
    for stale in (*folder.glob(".*.json.*.tmp"), *folder.glob(".*.model.*.tmp")):
        stale.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def read_json(path: Path, cure: str) -> Any:
    """Reads a JSON file of ours. Raises DataError with `cure` when it is missing or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; {cure}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {cure}") from error


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any, length: int = 12) -> str:
    """A short stable name for any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:length]


def free_bytes(path: Path) -> int:
    """Bytes that may still be written on the disk of `path` (its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def folder_lock(folder: Path, doing: str, name: str = "prepare", *, quiet: bool = False) -> Iterator[None]:
    """Lets one process at a time work on `folder`; a second one says so and waits.

    The kernel drops the lock when its holder ends, however it ends.
    """
    path = make_folder(folder) / f".{name}.lock"
    with write_errors(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if not quiet:
                print(f"waiting: process {holder} is {doing} in {folder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
