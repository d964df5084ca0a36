"""Damaged and missing files, a useless `latest`, a clock set back, a second process, a full or read-only disk."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tbf.checkpoints.folder import CheckpointFolder
from tbf.errors import CheckpointError, DataError
from tests.faults import disk
from tests.faults.processes import STEPS, Board, Runs, difference, newest
from tests.faults.tally import Tally

TAKEN = "named; the one before is taken"


def damage_checkpoints(folder: Path, straight: Path) -> list[Tally]:
    """Every file of the newest checkpoint: cut short at five places, one byte flipped, missing."""
    rows = [Tally(f"checkpoint file {how}", TAKEN) for how in ("cut short", "with a flipped byte", "missing")]
    run_dir = folder / "damaged"
    logging.getLogger("tbf").setLevel(logging.CRITICAL)  # a hundred lines that say what is expected here
    shutil.copytree(straight, run_dir)
    paths = [path for path, _ in CheckpointFolder(run_dir / "checkpoints").entries()]
    for path in sorted(paths[0].iterdir()):
        content = path.read_bytes()
        size = len(content.rstrip())  # a manifest without its last line break is the same manifest
        cuts = [content[: int(size * share)] for share in (0.0, 0.25, 0.5, 0.75)] + [content[: size - 1]]
        flips = [
            content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (0, size // 3, size // 2, size - 1)
        ]
        for row, changes in zip(rows, (cuts, flips, [None])):
            for change in changes:
                path.unlink() if change is None else path.write_bytes(change)
                row.record(**_found(run_dir, path, paths[1]))
                path.write_bytes(content)
    logging.getLogger("tbf").setLevel(logging.NOTSET)
    return rows


def _found(run_dir: Path, path: Path, before: Path) -> dict[str, object]:
    """What a resume makes of a damaged file."""
    started = time.monotonic()
    folder = CheckpointFolder(run_dir / "checkpoints")
    taken = folder.latest()
    seconds = time.monotonic() - started
    try:
        folder.verify(path.parent)
        message = "not noticed"
    except CheckpointError as error:
        message = str(error)
    problem = "" if taken == before and path.name in message else f"{path.name}: {taken.name} is taken; {message}"
    lost = int(path.parent.name[5:]) - int(before.name[5:])
    return {"problem": problem, "corrupt": taken == path.parent, "lost": lost, "seconds": seconds}


def resume_damaged(runs: Runs, straight: Path) -> Tally:
    """Whole runs that resume past a damaged newest checkpoint."""
    tally = Tally("resume with a damaged or missing rank file", "the checkpoint before is taken; bitwise equal")
    names = sorted(path.name for path in CheckpointFolder(straight / "checkpoints").latest().iterdir())
    for name in names:
        run_dir = runs.folder / f"past-{name}"
        shutil.copytree(straight, run_dir)
        path = run_dir / "checkpoints" / f"step-{STEPS:08d}" / name
        path.unlink() if name.endswith("optim_states.pt") else path.write_bytes(path.read_bytes()[:-9])
        board = Board()
        child = runs.start(run_dir.name, board=board)
        code, text = child.wait(), child.text()
        ok = code == 0 and "SKIPPING the newest checkpoint" in text and name in text and "falling back" in text
        problem = difference(run_dir, straight) if ok else f"{name}: exit code {code}: {text[-300:]}"
        tally.record(problem, corrupt=ok and bool(problem), lost=STEPS - board.resumed)
    return tally


def useless_latest(runs: Runs, straight: Path) -> Tally:
    tally = Tally("`latest` empty, wrong or gone", "the manifests decide; bitwise equal")
    for number, text in enumerate(("", "step-99999999\n", "../../etc\n", None)):
        run_dir = _half_a_run(runs, f"latest-{number}")
        latest = run_dir / "checkpoints" / "latest"
        latest.unlink() if text is None else latest.write_text(text)
        _finish(runs, run_dir, straight, tally)
    return tally


def clock_set_back(runs: Runs, straight: Path) -> Tally:
    """The process lives a year before the files that it resumes from."""
    tally = Tally("clock set back by a year", "no decision rests on a clock; bitwise equal")
    run_dir = _half_a_run(runs, "clock")
    real = time.time

    def set_back() -> None:
        time.time = lambda: real() - 365 * 86_400

    _finish(runs, run_dir, straight, tally, before=set_back)
    return tally


def second_process(runs: Runs, straight: Path) -> Tally:
    tally = Tally("a second process on the run folder", "refused with the first one's pid, exit 4; the first goes on")
    for number in range(3):
        board, name = Board(), f"shared-{number}"
        first = runs.start(name, board=board, before=functools.partial(_wait_at_three, board))
        while board.step < 3 and first.wait(0) is None:
            time.sleep(0.001)
        second = runs.start(name)
        code, text = second.wait(), second.text()
        board.set(changes=1)
        ours = first.wait()
        problem = (
            "" if code == CheckpointError.exit_code and f"pid {first.pid}" in text else f"exit code {code}: {text}"
        )
        problem = problem or (f"the first one: {ours}" if ours else difference(runs.folder / name, straight))
        tally.record(problem, corrupt=code == 0, seconds=second.seconds)
    return tally


def _wait_at_three(board: Board) -> None:
    from tbf.train.trainer import Trainer

    step = Trainer.train_step

    def take(trainer: Trainer, steps: object) -> object:
        while trainer.step == 3 and board.changes == 0:
            time.sleep(0.001)
        return step(trainer, steps)

    Trainer.train_step = take


def full_disk_in_runs(runs: Runs, straight: Path, changes: int, draw: random.Random, times: int) -> Tally:
    """A small file system that fills up at a random change of the run; then room is made and the run resumed."""
    tally = Tally("disk full in a run", "says so and stops (exit 3, 4) or finishes; resumed, bitwise equal")
    with small_disk(runs.folder / "small", "200m") as (place, why):
        if why:
            tally.fault += f" (injected: {why})"
        for number in range(times):
            name = f"small/full-{number}"
            at = draw.randrange(changes)
            filler = place / "filler"
            act = disk.full_from(at) if why else disk.fill_at(at, filler)
            run_dir = runs.folder / name
            child = runs.start(name, before=lambda run_dir=run_dir, act=act: disk.watch(run_dir, act))
            code, text = child.wait(), child.text()
            filler.unlink(missing_ok=True)
            if code not in (0, CheckpointError.exit_code, DataError.exit_code) or "Traceback" in text:
                tally.record(f"change {at}: exit code {code}: {text[-300:]}")
                continue
            if code and "No space left" not in text and "GB free" not in text:
                tally.record(f"change {at}: does not say why: {text[-300:]}")
                continue
            again = runs.start(name)
            problem = f"change {at}: {again.text()[-300:]}" if again.wait() else difference(run_dir, straight, "some")
            tally.record(problem, corrupt=bool(problem) and again.code == 0)
            shutil.rmtree(run_dir)
    return tally


def read_only(runs: Runs, straight: Path) -> Tally:
    tally = Tally("run folder turns read-only", "stops by name (exit 4) before any step; resumed, bitwise equal")
    with small_disk(runs.folder / "fixed", "200m") as (_, why):
        if why:
            tally.skipped = why
            return tally
        run_dir = _half_a_run(runs, "fixed/run")
        _mount("remount,ro", runs.folder / "fixed")
        board = Board()
        child = runs.start("fixed/run", board=board)
        code = child.wait()
        _mount("remount,rw", runs.folder / "fixed")
        if code != CheckpointError.exit_code or board.step >= 0:
            tally.record(f"exit code {code} at step {board.step}: {child.text()[-600:]}")
        else:
            _finish(runs, run_dir, straight, tally, seconds=child.seconds)
    return tally


def damaged_shards(runs: Runs, straight: Path) -> list[Tally]:
    """A flipped byte between two starts, and a file cut short under a run: named, made again, bitwise equal."""
    rows = [
        Tally("shard with a flipped byte at a start", "named (exit 3); made again, bitwise equal"),
        Tally("shard cut short under a run", "named (exit 3); made again, bitwise equal"),
    ]
    (shard,) = runs.cache.glob("shards/*/shard-00000.bin")
    content = shard.read_bytes()
    run_dir = _half_a_run(runs, "flipped-shard")
    middle = len(content) // 2
    shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    _shard_named(runs, run_dir, straight, rows[0], shard, before=lambda: None)
    run_dir = runs.folder / "cut-shard"

    def cut_later() -> None:
        from tbf.train.trainer import Trainer

        step = Trainer.train_step

        def cut(trainer: Trainer, steps: object) -> object:
            if trainer.step == 5:
                os.truncate(shard, 64)
            return step(trainer, steps)

        Trainer.train_step = cut

    _shard_named(runs, run_dir, straight, rows[1], shard, before=cut_later)
    assert shard.read_bytes() == content
    return rows


def _shard_named(runs: Runs, run_dir: Path, straight: Path, tally: Tally, shard: Path, before) -> None:
    board = Board()
    child = runs.start(run_dir.name, board=board, before=before)
    code, text = child.wait(), child.text()
    if code != DataError.exit_code or shard.name not in text or "Traceback" in text:
        tally.record(f"exit code {code}: {text[-400:]}", corrupt=code == 0)
    for file in shard.parent.glob(f"{shard.stem}.*"):
        file.unlink()
    lost = max(board.step - newest(run_dir), 0)
    if code == DataError.exit_code:
        _finish(runs, run_dir, straight, tally, lost=lost)
    else:
        runs.start(run_dir.name).wait()  # makes the shard again for those that follow


def _half_a_run(runs: Runs, name: str) -> Path:
    """A run that was stopped after six of its steps."""
    from tbf.train.signals import STOP_FILE

    def stop_at_six() -> None:
        from tbf.train.trainer import Trainer

        step = Trainer.train_step

        def take(trainer: Trainer, steps: object) -> object:
            if trainer.step == STEPS // 2 - 1:
                trainer.stop_request.request(f"as {STOP_FILE} would")
            return step(trainer, steps)

        Trainer.train_step = take

    child = runs.start(name, before=stop_at_six)
    assert child.wait() == 0 and newest(runs.folder / name) == STEPS // 2, child.text()[-2000:]
    return runs.folder / name


def _finish(runs: Runs, run_dir: Path, straight: Path, tally: Tally, before=lambda: None, **facts: object) -> None:
    child = runs.start(str(run_dir.relative_to(runs.folder)), before=before)
    problem = difference(run_dir, straight) if child.wait() == 0 else f"exit code {child.code}: {child.text()[-400:]}"
    tally.record(problem, corrupt=bool(problem) and child.code == 0, **facts)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[tuple[Path, str]]:
    """A small file system of its own at `place`; otherwise an ordinary folder and the reason."""
    place.mkdir()
    why = _mount(f"size={size},mode=755", place, "-t", "tmpfs", "tmpfs")
    try:
        yield place, why
    finally:
        if not why:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def _mount(options: str, place: Path, *what: str) -> str:
    """Returns why it was not possible, or ''."""
    try:
        done = subprocess.run(
            ["mount", *what[:2], "-o", options, *what[2:], str(place)], capture_output=True, text=True
        )
    except OSError as error:
        return f"no mount: {error.strerror}"
    return "" if done.returncode == 0 else f"mount is not allowed here ({done.stderr.strip()[:60]})"
