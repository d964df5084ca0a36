"""Notices that the launcher above this rank is gone, which otherwise leaves ranks training as orphans.

A SIGTERM to `deepspeed` ends only the runner: launch.py and the ranks live on, owned by init. When launch.py or
torchrun is killed outright, its ranks live on too, and `deepspeed` even reports success.
"""

from __future__ import annotations

import base64
import json

import psutil

_DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"


class LauncherWatch:
    """Remembers who started this process and says when one of them has ended. Cheap: one system call or two."""

    def __init__(self) -> None:
        self._started_by = _launchers()

    def gone(self) -> str | None:
        """Returns what ended, or None while all is well."""
        child = psutil.Process()
        for launcher, name in self._started_by:
            # A parent's end gives the child a new parent at once, even while the dead one is still a zombie.
            if child.ppid() != launcher.pid:
                return f"{name} (pid {launcher.pid}), which started this run, is gone"
            child = launcher
        return None


def planned_hosts() -> list[str]:
    """Where DeepSpeed's launcher starts each rank, as its own command line has it; empty under any other."""
    for part in _command(psutil.Process().parent()):
        if part.startswith("--world_info="):
            world = json.loads(base64.urlsafe_b64decode(part.partition("=")[2]))
            return [host for host, slots in world.items() for _ in slots]
    return []


def _launchers() -> list[tuple[psutil.Process, str]]:
    """The parent, and above DeepSpeed's launch.py also the `deepspeed` runner; nobody for a run of its own.

    Plain python's parent is a person's shell: its end is announced by a signal where it matters (not under nohup).
    """
    parent = psutil.Process().parent()
    command = _command(parent)
    if _DEEPSPEED_LAUNCH in command:
        runner = parent.parent()
        found = [(parent, "launch.py")]
        if any(part.rpartition("/")[2] in ("deepspeed", "deepspeed.pt", "ds") for part in _command(runner)[:3]):
            found.append((runner, "deepspeed"))
        return found
    if any(part.endswith(("torchrun", "torch.distributed.run", "torch/distributed/run.py")) for part in command[:3]):
        return [(parent, "torchrun")]
    return []


def _command(process: psutil.Process | None) -> list[str]:
    try:
        return process.cmdline() if process is not None else []
    except psutil.Error:
        return []
