"""What several parts ask of the operating system. Imports nothing of ours, so that all may use it."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")
"""Where a container sees its memory controller: versions 2 and 1."""
CGROUP_LIMITS = (f"{CGROUPS[0]}/memory.max", f"{CGROUPS[1]}/memory.limit_in_bytes")


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


def installed() -> dict[str, str | None]:
    """Versions of what all machines of a job must share; None for what is missing."""
    import tbf

    found: dict[str, str | None] = {"tbf": tbf.__version__, "python": platform.python_version()}
    for name in ("torch", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


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


def container_limit(paths: Sequence[str] = CGROUP_LIMITS) -> int | None:
    """Bytes that the control group allows; None without a limit."""
    for path in paths:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def host_memory(cgroups: Sequence[str] = CGROUPS) -> tuple[int, int]:
    """(bytes of memory, bytes that a process could still take) of this machine, or of the container around us.

    What files occupy in the page cache counts as free.
    """
    memory = psutil.virtual_memory()
    new, old = cgroups
    limit = container_limit((f"{new}/memory.max", f"{old}/memory.limit_in_bytes"))
    if limit is None or limit >= memory.total:
        return memory.total, memory.available
    free = limit
    for folder, used, cached in ((new, "memory.current", "inactive_file"),
                                 (old, "memory.usage_in_bytes", "total_inactive_file")):  # fmt: skip
        try:
            statistics = (Path(folder) / "memory.stat").read_text().split()
            cache = int(statistics[statistics.index(cached) + 1])
            free = limit - int((Path(folder) / used).read_text()) + cache
            break
        except (OSError, ValueError):
            continue
    return limit, max(0, min(free, memory.available))


def exchange(first: Path, second: Path) -> bool:
    """Swaps two paths of one file system in one step (renameat2 of Linux); False where that is not possible."""
    here, both_exist = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return rename(here, os.fsencode(first), here, os.fsencode(second), both_exist) == 0


def peak_memory() -> int:
    """Bytes of this process' resident memory at its peak, since `reset_peak`. Linux only."""
    return _status("VmHWM")


def reset_peak() -> int:
    """Starts the peak again from what is resident now, which is returned in bytes. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def disk_traffic() -> int:
    """Bytes that this process has read from disks and written to them so far."""
    counters = psutil.Process().io_counters()
    return counters.read_bytes + counters.write_bytes


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def busy() -> bool:
    """Whether other programs want more than this machine's cores, so that a time measured now says little."""
    return os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
