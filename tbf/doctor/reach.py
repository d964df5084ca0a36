"""How one of our modules is started on another machine: by the same interpreter, clone and variables as a job's."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "StrictHostKeyChecking=yes")
LOCAL = ("localhost", "127.0.0.1", "::1")


def command_on(host: str, module: Sequence[str]) -> list[str]:
    """The command line that runs `python -m MODULE ARGUMENTS` on a host, through ssh unless it is this one."""
    command = ["env", *launcher_variables(), sys.executable, "-m", *module]
    if host in LOCAL:
        return command
    remote = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(command)}"  # what ssh passes on is a shell's line
    return [*SSH, "--", host, remote]


def launcher_variables() -> list[str]:
    """NAME=VALUE of `.deepspeed_env`, from where the launcher reads it: the home folder, then this one."""
    found: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        path = folder / ".deepspeed_env"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        pairs = (re.fullmatch(r"([A-Za-z_]\w*)=(.*)", line.strip()) for line in lines)
        found.update(pair.groups() for pair in pairs if pair)
    return [f"{name}={value}" for name, value in found.items()]
