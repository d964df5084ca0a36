"""Versions, cards and time of this machine as one JSON line. Imports neither torch nor DeepSpeed: it runs over ssh.

python -m tbf.doctor.versions
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from tbf.system import installed

CARDS = Path("/proc/driver/nvidia/gpus")


def main() -> None:
    cards = len(list(CARDS.iterdir())) if CARDS.is_dir() else 0
    print(json.dumps({"versions": installed(), "cards": cards, "time": time.time()}))


if __name__ == "__main__":
    main()
