"""Disk space: what tbf holds, how much more it may write, and what could go."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tbf.data.files import write_errors

KEEP_FREE = 256 << 20
"""Bytes of a disk that preparation never uses."""
UNUSED_DAYS = 30.0
"""Cached shards that no run has opened for so long could go."""
_SETTLED_SECONDS = 3600.0  # a temporary file that nobody has touched for so long is left over


def folder_bytes(folder: Path) -> int:
    """Bytes that the files under `folder` take on the disk; files that vanish meanwhile count as nothing."""
    total = 0
    seen: set[tuple[int, int]] = set()
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except OSError:
            continue
        if path.is_dir() or (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        total += stat.st_blocks * 512
    return total


def used_bytes(roots: Iterable[Path]) -> int:
    """Bytes under all of `roots`, nested ones counted once."""
    resolved = sorted({root.resolve() for root in roots if root.is_dir()})
    outer = [root for root in resolved if not any(other in root.parents for other in resolved)]
    return sum(folder_bytes(root) for root in outer)


def budget_left(budget_gb: float, roots: Iterable[Path]) -> int:
    """Bytes of the budget that are not used by what is under `roots`: shards, caches, runs with their checkpoints and
    exports."""
    return max(0, int(budget_gb * 1e9) - used_bytes(roots))


@dataclass(frozen=True)
class Garbage:
    """Something that could go."""

    path: Path
    bytes: int
    reason: str


def find_garbage(
    caches: Sequence[Path], runs: Sequence[Path] = (), *, unused_days: float = UNUSED_DAYS
) -> list[Garbage]:
    """Lists what nobody needs: leftovers of killed processes, and cached shards not opened for `unused_days`.

    Args:
        caches: folders that hold `shards/` and `tokenizers/`, or RAM disks with copies of shards.
        runs: folders of runs. Finished checkpoints and exports are never listed.
    """
    now = time.time()
    found: list[Garbage] = []
    for cache in caches:
        folders = [folder for folder in sorted(cache.glob("shards/*")) if folder.is_dir()]
        for folder in folders:
            if _locked(folder):
                continue
            age = (now - _last_used(folder)) / 86400
            if age >= unused_days:
                what = "shards" if (folder / "index.json").exists() else "unfinished shards"
                found.append(Garbage(folder, folder_bytes(folder), f"{what}, not opened for {age:.0f} days"))
            else:
                found += _leftovers(folder.glob(".shard-*.tmp"), now)
        found += [
            Garbage(folder, folder_bytes(folder), "copy in memory, no process is using it")
            for folder in sorted(cache.glob("tbf-shards-*"))
            if not _locked(folder)
        ]
    for run in runs:
        hidden = [path for path in sorted(run.glob("*/checkpoints/.*")) if path.is_dir()]
        found += _leftovers(hidden, now)
    return found


def _last_used(folder: Path) -> float:
    plan = folder / "plan.json"  # written anew by every run that opens the folder
    return plan.stat().st_mtime if plan.exists() else folder.stat().st_mtime


def _locked(folder: Path) -> bool:
    for path in folder.glob(".*.lock"):
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def _leftovers(paths: Iterable[Path], now: float) -> list[Garbage]:
    return [
        Garbage(path, folder_bytes(path) if path.is_dir() else path.stat().st_size, "left by a killed process")
        for path in sorted(paths)
        if now - path.stat().st_mtime > _SETTLED_SECONDS
    ]


def delete_garbage(garbage: Iterable[Garbage]) -> int:
    """Deletes what `find_garbage` listed; returns the bytes freed."""
    freed = 0
    for item in garbage:
        with write_errors(item.path):
            if item.path.is_dir():
                (item.path / "index.json").unlink(missing_ok=True)  # first: half a corpus must not look whole
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
        freed += item.bytes
    return freed


def format_garbage(garbage: Sequence[Garbage], used: int, free: int, *, deleting: bool = False) -> str:
    """A table for people."""
    lines = [f"{human_bytes(item.bytes):>10}  {item.path}  ({item.reason})" for item in garbage]
    total = human_bytes(sum(item.bytes for item in garbage))
    lines.append(f"tbf holds {human_bytes(used)}; {human_bytes(free)} are free; {total} could go" + (
        ": run again with --yes to delete" if garbage and not deleting else ""
    ))  # fmt: skip
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
