"""A short measurement of a disk: one file, written and read past the page cache where the file system allows it."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from pathlib import Path

from tbf.doctor.machine import DiskSpeed

BLOCK, BLOCKS = 8 << 20, 32
LONGEST = 3.0  # seconds of writing, on a disk that is slow
DIRECT = getattr(os, "O_DIRECT", 0)


def disk_speed(folder: Path, block: int = BLOCK, blocks: int = BLOCKS) -> DiskSpeed:
    """Writes up to `blocks` blocks of random bytes into a new file of `folder`, syncs, reads them back, deletes it.

    Raises OSError when the folder can't be written or has no room for twice as much.
    """
    if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < 2 * block * blocks:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    handle, name = tempfile.mkstemp(prefix="tbf-speed-", dir=folder)
    os.close(handle)
    try:
        try:
            return _measure(name, block, blocks, DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL or not DIRECT:
                raise
            return _measure(name, block, blocks, 0)  # tmpfs and some network file systems have no direct access
    finally:
        Path(name).unlink(missing_ok=True)


def _measure(name: str, block: int, blocks: int, direct: int) -> DiskSpeed:
    buffer = mmap.mmap(-1, block)  # direct access wants memory at a page's start
    buffer.write(os.urandom(block))
    written, started = 0, time.perf_counter()
    handle = os.open(name, os.O_WRONLY | direct)
    try:
        while written < blocks * block and time.perf_counter() - started < LONGEST:
            written += os.write(handle, buffer)
        os.fsync(handle)
        write = written / (time.perf_counter() - started)
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    handle, started, got = os.open(name, os.O_RDONLY | direct), time.perf_counter(), 0
    try:
        while (count := os.readv(handle, [buffer])) > 0:
            got += count
        return DiskSpeed(write, got / (time.perf_counter() - started), bool(direct))
    finally:
        os.close(handle)
