"""Files that survive a power cut: each one is complete on the disk, or absent.

Every durable write, sync and rename of a run folder goes through here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tbf.errors import CheckpointError
from tbf.system import sync_folder

_CHUNK = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like: its length in bytes and the SHA-256 of its content, in hexadecimal."""

    bytes: int
    sha256: str


class DurableFile:
    """A new file that is hashed as it is written and has reached the disk when `close` returns.

    Hashing what was meant, rather than what is read back, also finds a disk that wrote something else.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.error: OSError | None = None
        """Why a write failed; torch.save reports something else."""

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        with self._noting():
            written = self._file.write(data)
        self._bytes += written
        return written

    def flush(self) -> None:
        with self._noting():
            self._file.flush()

    def close(self) -> FileRecord:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return FileRecord(self._bytes, self._hash.hexdigest())

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            raise

    def abandon(self) -> None:
        """Closes the handle of a file that could not be finished."""
        with contextlib.suppress(OSError):  # closing flushes again, into the same full disk
            self._file.close()


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[DurableFile]:
    """Opens a DurableFile; whoever wants its record calls `close` inside the block."""
    handle = DurableFile(path)
    try:
        yield handle
    finally:
        handle.abandon()


def write_durable(path: Path, content: bytes) -> FileRecord:
    """Writes a whole file and waits until it is on the disk."""
    with durable_file(path) as handle:
        handle.write(content)
        return handle.close()


def write_atomic(path: Path, content: bytes) -> FileRecord:
    """Replaces a file in one step: readers see the old content or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        record = write_durable(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return record


def to_json(value: Any) -> bytes:
    """Readable JSON; floats keep every bit."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def move_folder(source: Path, target: Path) -> None:
    """Renames a folder within its file system, durably."""
    source.rename(target)
    sync_folder(target.parent)


def remove_folder(folder: Path, first: str) -> None:
    """Deletes a folder, the file named `first` before any other, so that what is left can't pass for complete."""
    (folder / first).unlink(missing_ok=True)
    sync_folder(folder)
    shutil.rmtree(folder)


def hash_file(path: Path) -> FileRecord:
    """Reads a file through and returns its length and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as handle:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        while count := handle.readinto(buffer):
            digest.update(view[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of `folder`."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keeps a second process out of a run folder; the kernel lets go of the lock when the holder dies.

    Raises CheckpointError that names the holder.
    """
    path = run_dir / ".lock"
    try:
        handle = path.open("a+")
    except OSError as error:
        raise CheckpointError(f"cannot write to the run folder {run_dir}: {error.strerror}; pass --run-dir") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise CheckpointError(
                f"{run_dir} is in use by another process ({holder}); wait for it, stop it, or pass another --run-dir"
            ) from None
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield
