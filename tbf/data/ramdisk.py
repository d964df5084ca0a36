"""Copies of shards on a RAM disk, made in the background; whatever is not there yet is read from the disk."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import psutil

from tbf.data.files import free_bytes, make_folder, write_errors, write_json

LEAVE_FREE = 2 << 30
"""Bytes of memory that copies leave to everybody else."""
RECORD = "ram.json"
_RAM_FILESYSTEMS = {"tmpfs", "ramfs"}


def is_ram_disk(path: Path) -> bool:
    """Is `path` (or the nearest parent that exists) on a file system in memory?"""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    mounts: dict[str, str] = {}
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, where, kind, *_ = line.split()
            mounts[where.replace("\\040", " ")] = kind
    except OSError:
        return False
    resolved = path.resolve()
    nearest = next((str(p) for p in [resolved, *resolved.parents] if str(p) in mounts), "/")
    return mounts.get(nearest) in _RAM_FILESYSTEMS


class RamCopy:
    """The copy of one shard folder on a RAM disk.

    Args:
        folder: the shards on the disk.
        ram_dir: a folder on a RAM disk.
        key: of the shards (`ShardIndex.key`); copies of other shards are never taken for these.
        leave_free: bytes of memory not to use.
    """

    def __init__(self, folder: Path, ram_dir: Path, key: str, *, leave_free: int = LEAVE_FREE) -> None:
        self.folder, self.leave_free = folder, leave_free
        self.copy = ram_dir / f"tbf-shards-{key[:16]}"
        self.note = ""
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def path(self, name: str) -> Path:
        """Where to read a file of the folder now."""
        copy = self.copy / name
        return copy if copy.exists() else self.folder / name

    def start(self) -> None:
        """Copies in the background. Of several processes one does it; a second call changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ram-copy", daemon=True)
            self._thread.start()

    def wait(self) -> str:
        """Waits for the copying to end; returns why it stopped early, or ''."""
        if self._thread:
            self._thread.join()
        return self.note

    def stop(self) -> None:
        self._stop.set()
        self.wait()

    def _run(self) -> None:
        try:
            make_folder(self.copy)
            with (self.copy / ".copy.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in self.copy.rglob(".*.tmp"):
                    left.unlink()
                for source in self._files():
                    if self._stop.is_set() or not self._copy(source):
                        return
        except BlockingIOError:
            self.note = "another process is copying"
        except Exception as error:  # the disk copy serves as well; a thread has nobody to tell
            self.note = f"stopped copying to {self.copy}: {error}"

    def _files(self) -> list[Path]:
        rows = sorted(self.folder.glob("rows/*/*.rows"))  # small, and needed for every row
        return rows + sorted(self.folder.glob("shard-*.bin"))

    def _copy(self, source: Path) -> bool:
        target = self.copy / source.relative_to(self.folder)
        size = source.stat().st_size
        if target.exists():
            return True
        free = min(free_bytes(self.copy), psutil.virtual_memory().available - self.leave_free)
        if size > free:
            self.note = f"{self.copy} has no room for {source.name}; it and what follows is read from the disk"
            return False
        make_folder(target.parent)
        aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with write_errors(aside):
            try:
                shutil.copyfile(source, aside)
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
        return True


def record_ram_dir(folder: Path, ram_dir: Path | None) -> None:
    """Tells every process that opens `folder` where its copy is; None: nowhere."""
    path = folder / RECORD
    if ram_dir is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, {"ram_dir": str(ram_dir.absolute())})


def recorded_copy(folder: Path, key: str) -> RamCopy | None:
    """The copy that `record_ram_dir` told of."""
    try:
        ram_dir = Path(json.loads((folder / RECORD).read_text())["ram_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return RamCopy(folder, ram_dir, key) if ram_dir.is_dir() else None
