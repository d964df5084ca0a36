"""Every single change that saving and rotating checkpoints makes to the disk: killed there, and the disk full there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from tbf.checkpoints.folder import CheckpointFolder
from tbf.errors import CheckpointError
from tbf.train.checkpoint import CheckpointStore
from tests.faults import disk
from tests.faults.processes import Board, Child
from tests.faults.tally import Tally
from tests.helpers.fake_engine import FakeEngine

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}


def save(store: CheckpointStore, step: int) -> None:
    engine = FakeEngine()
    engine.weight = torch.full((8,), float(step))
    store.save(engine, step, {"step": step}, 0, 1, LOSSES.get(step))


def resume(root: Path) -> tuple[CheckpointStore, int]:
    """As a new process would; raises AssertionError when the state is not what was saved at its step."""
    store, engine = CheckpointStore(root), FakeEngine()
    step = store.load(engine, "latest", 0, 1)["step"]
    assert torch.equal(engine.weight, torch.full((8,), float(step))), f"step {step} holds other weights"
    return store, step


def three_saved(root: Path) -> CheckpointStore:
    """Checkpoints 1 to 3 with the best one at 2: the next save deletes one."""
    store = CheckpointStore(root)
    for step in (1, 2, 3):
        save(store, step)
    return store


def kill_saves(folder: Path, every: int = 1) -> Tally:
    """Kills a save with rotation at each of its changes, or at each `every`-th."""
    tally = Tally("kill -9 at every change of a save and rotation", "the newest complete checkpoint loads and saves on")
    changes = _count(folder / "counted")
    for number in range(0, changes, every):
        root = folder / f"kill-{number}"
        store, board = three_saved(root), Board()
        child = _save_with(store, board, disk.die_at(number))
        if child.wait() != -signal.SIGKILL:
            tally.record(f"change {number} of {changes} was not reached: {child.text()[-300:]}")
            continue
        problem, corrupt = _check(root, least=4 if board.saved == 4 else 3)
        tally.record(problem, corrupt=corrupt)
    return tally


def fill_saves(folder: Path, every: int = 1) -> Tally:
    """The same with a disk that is full from there on."""
    tally = Tally("disk full at every change of a save", "refused by name; the earlier checkpoints load and save on")
    changes = _count(folder / "counted-full")
    for number in range(0, changes, every):
        root = folder / f"full-{number}"
        store, board = three_saved(root), Board()
        child = _save_with(store, board, disk.full_from(number))
        code, text = child.wait(), child.text()
        if code not in (0, CheckpointError.exit_code) or "Traceback" in text or "No space left" not in text:
            tally.record(f"change {number}: exit code {code}: {text[-300:]}")
            continue
        problem, corrupt = _check(root, least=4 if code == 0 else 3)
        tally.record(problem, corrupt=corrupt, seconds=child.seconds)
    return tally


def _save_with(store: CheckpointStore, board: Board, act: Callable[[int], None]) -> Child:
    """Saves a fourth checkpoint in a child whose disk acts at its changes."""
    from tbf.errors import run_program

    def main() -> None:
        disk.watch(store.root, act)
        save(store, 4)
        board.set(saved=4)

    return Child(lambda: run_program(main), store.root.with_suffix(".log"))


def _count(root: Path) -> int:
    board, store = Board(), three_saved(root)
    assert _save_with(store, board, lambda count: board.set(changes=count + 1)).wait() == 0
    return board.changes


def _check(root: Path, least: int) -> tuple[str, bool]:
    """(what is wrong, whether a wrong state was loaded)."""
    try:
        store, step = resume(root)
    except (AssertionError, CheckpointError) as error:
        return str(error), isinstance(error, AssertionError)
    if step < least:
        return f"step {least} was saved, {step} is loaded", False
    steps = {manifest.step for _, manifest in store.entries()}
    if not {2, 3} <= steps:
        return f"an older checkpoint is gone: {sorted(steps)}", False
    save(store, 5)
    if resume(root)[1] != 5 or sorted(m.step for _, m in CheckpointFolder(root).entries()) not in (
        [2, 3, 5],
        [2, 4, 5],
    ):
        return "the next save did not tidy up", False
    left = [name for name in os.listdir(root) if name.startswith((".saving", ".deleting", "superseded"))]  # noqa: PTH208
    return (f"left behind: {left}" if left else ""), False
