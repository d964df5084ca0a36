"""Breaks runs in every way we know and shows what they survive.

    python -m tests.faults [--quick] [--seed 0] [--only NAME ...] [--jobs 2] [--list]

Prints one table; the last line is one JSON object. Exits with 1 when a fault was not survived. The random moments come
from the seed, but a moment in time is never the same twice.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.faults import damage, kills, launched, pipelines, saves, steps
from tests.faults.processes import Runs, warm_up
from tests.faults.tally import Tally, figures, table

Group = Callable[[Runs, Path, random.Random, bool], Iterator[Tally]]


def killed_runs(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    fault = "kill -9 at random moments of a run"
    yield kills.kill_runs(runs, straight, fault, draw, 2 if quick else 80, kills.at_a_moment, "moment")


def killed_at_changes(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    fault = "kill -9 at random writes, syncs, renames of a run"
    strike = kills.at_a_change(kills.count_changes(runs))
    yield kills.kill_runs(runs, straight, fault, draw, 2 if quick else 80, strike, "change")


def killed_saves(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    yield saves.kill_saves(runs.folder, every=6 if quick else 1)
    yield saves.fill_saves(runs.folder, every=6 if quick else 1)


def killed_pipelines(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    few = 2 if quick else None
    for name in ("export", "data", "tokenizer"):
        (runs.folder / name).mkdir()
    yield pipelines.kill_exports(runs.folder / "export", straight, draw, few)
    yield pipelines.kill_preparation(runs.folder / "data", straight, draw, few)
    if not quick:
        yield pipelines.kill_tokenizer(runs.folder / "tokenizer", draw, 20)


def damaged_files(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    yield from damage.damage_checkpoints(runs.folder, straight)
    if not quick:
        yield damage.resume_damaged(runs, straight)
        yield damage.useless_latest(runs, straight)
        yield damage.clock_set_back(runs, straight)
        yield damage.second_process(runs, straight)
        own = runs.folder / "own"
        shutil.copytree(runs.cache, own / "data")
        yield from damage.damaged_shards(Runs(own), straight)


def broken_disks(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    times = 2 if quick else 30
    yield damage.full_disk_in_runs(runs, straight, kills.count_changes(runs), draw, times)
    yield damage.read_only(runs, straight)


def stopped_runs(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    yield kills.stop_runs(runs, straight, draw, 2 if quick else 15)


def bad_steps(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    yield from steps.bad_numbers(runs, draw, each=1 if quick else 4)


def lost_ranks(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    together = [child.wait() for child in runs.start_ranks("straight-2")]
    assert together == [0, 0]
    yield steps.stopped_ranks(runs, runs.folder / "straight-2", draw, times=1 if quick else 8)
    yield from steps.lost_ranks(runs, draw, each=1 if quick else 4)


def launchers(runs: Runs, straight: Path, draw: random.Random, quick: bool) -> Iterator[Tally]:
    yield from launched.launched_faults(runs.folder)


GROUPS: dict[str, Group] = {
    "launchers": launchers,
    "killed_runs": killed_runs,
    "killed_at_changes": killed_at_changes,
    "broken_disks": broken_disks,
    "lost_ranks": lost_ranks,
    "pipelines": killed_pipelines,
    "bad_steps": bad_steps,
    "stopped_runs": stopped_runs,
    "damaged_files": damaged_files,
    "saves": killed_saves,
}
QUICK = ("killed_at_changes", "pipelines", "damaged_files", "saves")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"a few faults of {', '.join(QUICK)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="NAME", help="these groups")
    parser.add_argument("--jobs", type=int, default=2, help="groups at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--list", action="store_true", help="the names of the groups")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(GROUPS))
        return 0
    names = arguments.only or (QUICK if arguments.quick else tuple(GROUPS))
    started = time.monotonic()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="tbf-faults-", dir=arguments.folder) as folder:
        rows = _run(names, Path(folder).resolve(), arguments)
    print(table(rows))
    found = figures(rows)
    print(f"{found['survived']} of {found['tried']} survived; {time.monotonic() - started:.0f} s")
    print(json.dumps({"benchmark": "faults", "machine": _machine(), "rows": [vars(row) for row in rows],
                      "figures": found}))  # fmt: skip
    return 0 if found["survived"] == found["tried"] and found["corrupt_resumes"] == 0 else 1


def _run(names: tuple[str, ...], folder: Path, arguments: argparse.Namespace) -> list[Tally]:
    """The groups' rows, in the groups' order; each group in a process and a folder of its own."""
    common = Runs(folder)
    straight = common.start("straight")
    assert straight.wait() == 0, straight.text()
    context = multiprocessing.get_context("fork")
    waiting, found = list(names), {}
    running: dict[Connection, tuple[str, multiprocessing.process.BaseProcess]] = {}
    while waiting or running:
        while waiting and len(running) < arguments.jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe()
            (folder / name).mkdir()
            runs = Runs(folder / name, common.cache)
            process = context.Process(target=_group, args=(name, runs, folder / "straight", arguments, theirs))
            process.start()
            theirs.close()
            running[ours] = (name, process)
        for connection in wait(list(running)):
            name, process = running.pop(connection)
            try:
                found[name], seconds = connection.recv()
                print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            except EOFError:
                broken = Tally(name, "the suite itself goes on")
                broken.record(f"the group ended by an error of its own, exit code {process.exitcode}; see above")
                found[name] = [broken]
            process.join()
    return [row for name in names for row in found[name]]


def _group(name: str, runs: Runs, straight: Path, arguments: argparse.Namespace, result: Connection) -> None:
    started = time.monotonic()
    rows = list(GROUPS[name](runs, straight, random.Random(f"{name}{arguments.seed}"), arguments.quick))
    result.send((rows, time.monotonic() - started))


def _machine() -> dict[str, object]:
    import torch

    from tbf.system import processor

    name = processor().partition("model name")[2].partition("\n")[0].strip("\t :")
    return {"processor": name, "cores": os.cpu_count(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
