"""Versions, cards and time of this machine as one JSON line. Imports neither torch nor DeepSpeed: it runs over ssh.

python -m tbf.doctor.versions
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tbf

CARDS = Path("/proc/driver/nvidia/gpus")


def installed() -> dict[str, str | None]:
    """Versions of what all machines of a job must share; None for what is missing."""
    found: dict[str, str | None] = {"tbf": tbf.__version__, "python": platform.python_version()}
    for name in ("torch", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    cards = len(list(CARDS.iterdir())) if CARDS.is_dir() else 0
    print(json.dumps({"versions": installed(), "cards": cards, "time": time.time()}))


if __name__ == "__main__":
    main()
