"""What each shipped ds_config takes for the 2048 models on P40s, as the planner has it: ds_configs/README.md.

    python benchmarks/ds_configs.py [--quick]

The preset's own micro batch and accumulation, one card beside 128 GB; two such machines for `p40_multinode.json`. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tbf.config import load_run_config
from tbf.planning.machine import choose_machine
from tbf.planning.plan import Planner, memory_by_place
from tbf.train.ds_config import load_ds_config

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
PRESETS = ("frankenstein_2048", "frankenstein_2048_moe")


def row(planner: Planner, preset: str, path: Path) -> dict[str, Any]:
    """Bytes of one rank, what a step moves, its seconds, and what does not fit."""
    resolved, run = load_ds_config(path, load_run_config(preset), planner.machine.ranks)
    run = run.replace(model={"vocab_size": run.data.wanted_vocab_size})
    plan = planner.plan(run, resolved.as_planned())
    places = memory_by_place(plan.items, plan.activations, plan.machine.device.on_cuda)
    [host] = [verdict.needed for verdict in plan.verdicts if verdict.resource == "host memory"]
    return {
        "preset": preset, "ds_config": path.name, "card": places["device"], "host": host,
        "nvme": places["nvme"], "pcie": plan.traffic.to_host + plan.traffic.to_device, "seconds": plan.time.total,
        "lacks": [verdict.resource for verdict in plan.verdicts if not verdict.fits],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first preset alone")
    arguments = parser.parse_args()
    rows = []
    for preset in PRESETS[:1] if arguments.quick else PRESETS:
        for nodes in (1, 2):
            machine = choose_machine("p40", nodes=nodes)
            planner = Planner(machine, say=lambda text: print(text, file=sys.stderr, flush=True))
            for path in sorted(FOLDER.glob("*.json")):
                if (path.stem == "p40_multinode") == (nodes == 2):
                    rows.append(row(planner, preset, path))
    print("| model | file | card | host | NVMe | PCIe a step | a step | fits |")
    print("|---|---|---|---|---|---|---|---|")
    for found in rows:
        sizes = " | ".join(f"{found[key] / 1e9:.1f} GB" for key in ("card", "host", "nvme", "pcie"))
        fits = "yes" if not found["lacks"] else f"no: {', '.join(found['lacks'])}"
        print(f"| `{found['preset']}` | `{found['ds_config']}` | {sizes} | {found['seconds']:.0f} s | {fits} |")
    worst = max(found["host"] for found in rows)
    print(json.dumps({"benchmark": "ds_configs", "machine": {"card": "p40"}, "rows": rows, "figures": {"host": worst}}))


if __name__ == "__main__":
    main()
