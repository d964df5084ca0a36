"""Versions, cards, time and data of this machine as one JSON line. It runs over ssh, so without torch and DeepSpeed.

python -m tbf.doctor.versions [PREPARED_DATA]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tbf.errors import TbfError, first_line
from tbf.system import installed

CARDS = Path("/proc/driver/nvidia/gpus")


def main() -> None:
    cards = len(list(CARDS.iterdir())) if CARDS.is_dir() else 0
    found = {"versions": installed(), "cards": cards, "time": time.time()}
    if len(sys.argv) > 1:
        found["data"] = describe_data(Path(sys.argv[1]))
    print(json.dumps(found))


def describe_data(folder: Path) -> dict[str, str]:
    """Fingerprints of a prepared folder by its index, if its files are there in full; else the `error`."""
    from tbf.data.shards import ShardIndex

    try:
        index = ShardIndex.read(folder)
        for shard in index.shards:
            wanted, path = shard.tokens * index.dtype.itemsize, folder / f"{shard.name}.bin"
            if not path.is_file() or path.stat().st_size != wanted:
                return {"error": f"{path} is missing or cut short"}
    except (TbfError, OSError) as error:
        return {"error": first_line(error)}
    return {"tokenizer": index.tokenizer[:12], "text": index.key[:12]}


if __name__ == "__main__":
    main()
