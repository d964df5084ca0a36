"""What several parts ask of the operating system. Imports nothing of ours, so that all may use it."""

from __future__ import annotations

import errno
import os
import platform
from pathlib import Path


def cache_root() -> Path:
    """`tbf` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tbf"


def processor() -> str:
    """What native code depends on: the processor's model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def processor_name() -> str:
    """The processor's model, for people."""
    first = next((line for line in processor().splitlines() if line.startswith("model name")), "")
    return first.partition(":")[2].strip() or platform.machine()


def sync_folder(folder: Path) -> None:
    """Waits until the entries of a folder (names, renames, deletions) are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync folders by themselves
            raise
    finally:
        os.close(handle)


def peak_memory() -> int:
    """Bytes of this process' resident memory at its peak, since `reset_peak`. Linux only."""
    return _status("VmHWM")


def reset_peak() -> int:
    """Starts the peak again from what is resident now, which is returned in bytes. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
