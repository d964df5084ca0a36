"""How long a checkpoint keeps training waiting, written on and off the critical path, and how large it is.

    python benchmarks/checkpoint_pause.py [--quick] [--models mini slice] [--rounds 3] [--folder DIR]

`mini` and `slice` (two layers of frankenstein_2048, 2048 wide) with a vocabulary of 50,000, ZeRO-2 with the optimizer
on the host, one rank. Both ways take turns on one engine. The pause is the time that `save` takes; with the copy in
memory (`train.save_in_background`) the writing goes on beside steps, whose time is shown beside that of undisturbed
ones. Every checkpoint is then verified. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from train_step import DS_CONFIG, MODELS, make_batch, make_run  # noqa: E402  (settles the environment first)

from tbf.checkpoints.folder import CheckpointFolder  # noqa: E402
from tbf.system import processor_name  # noqa: E402
from tbf.train import distributed  # noqa: E402
from tbf.train.build_ops import prepare_ops  # noqa: E402
from tbf.train.checkpoint import CheckpointStore  # noqa: E402
from tbf.train.ds_config import load_ds_config  # noqa: E402
from tbf.train.environment import discover_process  # noqa: E402
from tbf.train.run import build_engine  # noqa: E402


class Bench:
    """An engine, its store, and what was measured with them."""

    def __init__(self, name: str, folder: Path) -> None:
        config, run = load_ds_config(DS_CONFIG, make_run(name), 1)
        prepare_ops(config.needs_cpu_adam, print)
        self.engine = build_engine(run, config, torch.device("cpu"), lambda text: None)
        self.batch = make_batch(run)
        self.store = CheckpointStore(folder, keep_best=0)
        self.number = 0

    def step(self) -> float:
        started = time.perf_counter()
        self.engine.backward(self.engine(**self.batch).loss)
        self.engine.step()
        return time.perf_counter() - started

    def save(self, background: bool) -> dict[str, float | None]:
        """Saves once, with steps beside it where there is room for them; times in seconds, sizes in GB."""
        self.number += 1
        started = time.perf_counter()
        path = self.store.save(self.engine, self.number, {"step": self.number}, 0, 1, background=background)
        pause = time.perf_counter() - started
        saving, steps = self.store._saving, []
        assert (saving is not None) == background, "there is no memory for a copy"
        while saving is not None and saving.running:
            steps.append(self.step())
        self.store.finish()
        whole = saving.seconds + pause if saving else pause
        manifest = CheckpointFolder(path.parent).verify(path)
        return {
            "pause_s": pause,
            "whole_s": whole,
            "gb": manifest.total_bytes / 1e9,
            "step_beside_s": median(steps[:-1]) if len(steps) > 1 else None,  # the last one is only in part beside it
        }


def measure(name: str, rounds: int, folder: Path) -> list[dict[str, object]]:
    bench = Bench(name, folder / name)
    for _ in range(2):
        bench.step()
    bench.save(background=False)  # warms the disk up
    found: dict[bool, list[dict[str, float | None]]] = {False: [], True: []}
    alone = []
    for _ in range(rounds):
        for background in found:
            alone.append(bench.step())
            found[background].append(bench.save(background))
    rows = []
    for background, saves in found.items():
        row = {"model": name, "in_background": background, "step_s": median(alone)}
        for key in ("pause_s", "whole_s", "gb", "step_beside_s"):
            known = [save[key] for save in saves if save[key] is not None]
            row[key] = median(known) if known else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="mini alone, one round")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.rounds = ["mini"], 1
    distributed.start(discover_process(), on_cpu=True)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="tbf-pause-") as folder:
        for name in arguments.models:
            rows += measure(name, arguments.rounds, Path(folder))
    distributed.stop()
    print(
        f"{'model':8} {'saved':>18} {'size GB':>9} {'pause s':>9} {'written s':>10} {'step s':>8} {'beside it s':>12}"
    )
    for row in rows:
        way = "beside training" if row["in_background"] else "while it waits"
        beside = "-" if row["step_beside_s"] is None else f"{row['step_beside_s']:.2f}"
        print(
            f"{row['model']:8} {way:>18} {row['gb']:9.2f} {row['pause_s']:9.2f} {row['whole_s']:10.2f} "
            f"{row['step_s']:8.2f} {beside:>12}"
        )
    machine = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    figures = {}
    for name in arguments.models:
        waits, beside = (row for row in rows if row["model"] == name)
        figures[f"pause_on_path_s@{name}"] = waits["pause_s"]
        figures[f"pause_off_path_s@{name}"] = beside["pause_s"]
        figures[f"checkpoint_gb@{name}"] = waits["gb"]
    print(json.dumps({"benchmark": "checkpoint_pause", "machine": machine, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
