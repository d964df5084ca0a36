"""kill -9 of whole training runs, at random moments and at random changes of the disk, again and again."""

from __future__ import annotations

import functools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tbf.checkpoints.folder import CheckpointFolder
from tests.faults import disk
from tests.faults.processes import SAVE_EVERY, STEPS, Board, Child, Runs, difference, newest
from tests.faults.tally import Tally

EQUAL = "resumes from the last complete checkpoint; the finished run is bitwise equal"
Strike = Callable[[Callable[..., Child], Path, Board, random.Random], Child]


def at_a_moment(start: Callable[..., Child], run_dir: Path, board: Board, draw: random.Random) -> Child:
    """Kills at a random time: mostly in the steps and saves, sometimes while the run starts."""
    child = start()
    if draw.random() < 0.8:
        while board.step < 0 and child.wait(0) is None:
            time.sleep(0.001)
        child.wait(draw.uniform(0.0, 0.4))
    else:
        child.wait(draw.uniform(0.0, 1.0))
    child.end()
    return child


def at_a_change(changes: int) -> Strike:
    """Kills before one of the `changes` that a whole run makes to its folder, or in the middle of a write."""

    def strike(start: Callable[..., Child], run_dir: Path, board: Board, draw: random.Random) -> Child:
        act = disk.die_at(draw.randrange(changes))
        child = start(before=lambda: disk.watch(run_dir, act))
        assert child.wait() is not None, child.text()[-2000:]
        return child

    return strike


def count_changes(runs: Runs) -> int:
    """How many changes one undisturbed run makes to its folder."""
    board = Board()
    watch = lambda: disk.watch(runs.folder / "counted", lambda count: board.set(changes=count + 1))  # noqa: E731
    assert runs.start("counted", before=watch).wait() == 0
    return board.changes


def kill_runs(
    runs: Runs, straight: Path, fault: str, draw: random.Random, kills: int, strike: Strike, name: str
) -> Tally:
    """Kills runs until `kills` have hit; every run is resumed until it ends by itself, then compared.

    Every other run saves beside training, the others while it waits.
    """
    tally = Tally(fault, EQUAL)
    hits: list[tuple[str, int]] = []
    number = before = 0
    while tally.tried < kills or hits:
        run_dir, board = runs.folder / f"{name}-{number}", Board()
        enough = tally.tried + len(hits) >= kills
        way = f"train.save_in_background={'true' if number % 2 == 0 else 'false'}"
        start = functools.partial(runs.start, run_dir.name, way, board=board)
        child = start() if enough else strike(start, run_dir, board, draw)
        code = child.wait()
        wrong = ""
        if board.resumed >= 0 and board.resumed != before:
            wrong = f"resumed at step {board.resumed} instead of {before}"
        if code == -signal.SIGKILL:
            after = newest(run_dir)
            whole = len(CheckpointFolder(run_dir / "checkpoints").entries())
            if after < max(board.saved, before):
                wrong = f"step {max(board.saved, before)} was saved, {after} is left"
            elif whole < min(2, after // SAVE_EVERY):
                wrong = f"{whole} checkpoints are left at step {after}"
            hits.append((wrong, max(board.step, after) - after))
            before = after
            continue
        problem = wrong or (f"exit code {code}: {child.text()[-300:]}" if code else difference(run_dir, straight))
        for hit, lost in hits:
            tally.record(hit or problem, corrupt=bool(problem), lost=lost)
        hits, number, before = [], number + 1, 0
    return tally


def stop_runs(runs: Runs, straight: Path, draw: random.Random, stops: int) -> Tally:
    """SIGTERM at random moments: the run saves and leaves with 143, or is not yet in training; nothing is lost."""
    tally = Tally("SIGTERM to the process", "saves, exit 143; the finished run is bitwise equal")
    hits: list[tuple[str, int, float]] = []
    number = 0
    while tally.tried < stops or hits:
        name, board = f"stopped-{number}", Board()
        child = runs.start(name, board=board)
        if tally.tried + len(hits) < stops:
            while board.step < 0 and child.wait(0) is None:
                time.sleep(0.001)
            child.wait(draw.uniform(0.0, 0.4))
            child.send(signal.SIGTERM)
        sent = time.monotonic()
        code = child.wait()
        if code == 143:
            lost = board.step - newest(runs.folder / name)
            hits.append(("" if lost == 0 else f"{lost} steps lost", lost, time.monotonic() - sent))
            continue
        # A signal that comes after the last step, when the handlers are gone, ends a run that is saved.
        ended = code == 0 or (code == -signal.SIGTERM and newest(runs.folder / name) == STEPS)
        problem = difference(runs.folder / name, straight) if ended else f"exit code {code}: {child.text()[-300:]}"
        for hit, lost, seconds in hits:
            tally.record(hit or problem, corrupt=bool(problem), lost=lost, seconds=seconds)
        hits, number = [], number + 1
    return tally
