"""What goes wrong in a step of two ranks: bad numbers, a rank that dies, stops, lacks memory or is told to end."""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import time
from pathlib import Path

from tbf.train.status import read_status
from tests.faults.processes import STEPS, Board, Child, Runs, newest
from tests.faults.tally import Tally
from tests.helpers.faults import KINDS, Fault, faults
from tests.helpers.runs import metrics

TIMEOUT_S = 8.0
GUARDED = ("train.spike_window=6", "train.spike_sigmas=30.0", "train.max_bad_steps=9")
WATCHED = (f"train.stall_timeout_s={TIMEOUT_S}",)
_held = contextlib.ExitStack()
NAMES = {"nan_loss": "NaN in one rank's loss", "nan_gradient": "NaN in one rank's gradient",
         "nan_activation": "NaN in one rank's activations", "spike_loss": "spike of the loss",
         "spike_gradient": "spike of the gradient"}  # fmt: skip


def bad_numbers(runs: Runs, draw: random.Random, each: int) -> list[Tally]:
    """One bad step at a random place: skipped on both ranks, the steps before as in a run without it."""
    assert all(child.wait() == 0 for child in runs.start_ranks("clean-2", *GUARDED))
    clean = metrics(runs.folder / "clean-2", "step", "loss", "grad_norm")
    rows = []
    for kind in KINDS:
        tally = Tally(NAMES[kind], "skipped on every rank; the run goes on")
        for number in range(each):
            at, rank = draw.randrange(4, STEPS), draw.randrange(2) if kind.startswith("nan") else None
            name = f"{kind}-{number}"
            meet = functools.partial(_meet, Fault(kind, at, at, rank))
            children = runs.start_ranks(name, *GUARDED, before=[meet, meet])
            codes = [child.wait() for child in children]
            ours = metrics(runs.folder / name, "step", "loss", "grad_norm") if codes == [0, 0] else []
            skipped = metrics(runs.folder / name, "skipped")[-1:] if ours else []
            said = f"step {at + 1} skipped on every rank" in children[0].text()
            fine = codes == [0, 0] and ours[: at + 1] == clean[: at + 1] and skipped == [("1",)] and said
            wrong = f"data step {at}, rank {rank}: exit codes {codes}, skipped {skipped}: {children[0].text()[-300:]}"
            tally.record("" if fine else wrong, corrupt=codes == [0, 0] and not fine, lost=1)
        rows.append(tally)
    return rows


def _meet(fault: Fault) -> None:
    """To the end of this process."""
    _held.enter_context(faults(fault))


def lost_ranks(runs: Runs, draw: random.Random, each: int) -> list[Tally]:
    """A rank that is killed, stopped, or runs out of memory: the other names it and leaves; the run resumes."""
    return [
        _lost(runs, draw, each, "a rank killed", signal.SIGKILL),
        _lost(runs, draw, each, "a rank stopped (SIGSTOP)", signal.SIGSTOP),
        _lost(runs, draw, each, "out of memory in a step of one rank", None),
    ]


def _lost(runs: Runs, draw: random.Random, each: int, fault: str, number: int | None) -> Tally:
    tally = Tally(fault, "named by the other rank, which leaves; the run resumes and finishes")
    for attempt in range(each):
        name = f"{fault.split()[-1].strip('()')}-{attempt}"
        at = draw.randrange(1, STEPS - 1)
        board, victim = Board(), draw.randrange(2)
        before = [lambda: None, lambda: None]
        if number is None:
            before[victim] = lambda at=at, board=board: _too_much_memory(at, board)
        children = runs.start_ranks(name, *WATCHED, before=before, board=board)
        struck = _strike(children, victim, number, at, board)
        other = children[1 - victim]
        code = other.wait(60)
        seconds = time.monotonic() - struck
        step, text = board.step, other.text()
        for child in children:
            child.end()
        named = f"rank {victim} " in text
        if code in (0, None) or not named:
            tally.record(f"the other rank: exit code {code}: {text[-400:]}", seconds=seconds)
            continue
        if number is None and "Traceback" in children[victim].text() and "memory" not in children[victim].text():
            tally.record(f"it does not speak of memory: {children[victim].text()[-300:]}")
            continue
        status = read_status(runs.folder / name)
        if status["state"] not in ("failed", "killed"):
            tally.record(f"run_status.json says {status}", seconds=seconds)
            continue
        left = newest(runs.folder / name)
        again = [child.wait() for child in runs.start_ranks(name, *WATCHED)]
        done = again == [0, 0] and newest(runs.folder / name) == STEPS
        tally.record("" if done else f"resumed: exit codes {again}", lost=step - left, seconds=seconds)
    return tally


def _strike(children: list[Child], victim: int, number: int | None, at: int, board: Board) -> float:
    """Waits for step `at` and does it; returns when (monotonic)."""
    if number is None:
        while board.changes == 0 and children[victim].wait(0) is None:
            time.sleep(0.001)
        return time.monotonic()
    while board.step < at and all(child.wait(0) is None for child in children):
        time.sleep(0.001)
    children[victim].send(number)
    return time.monotonic()


def _too_much_memory(at: int, board: Board) -> None:
    """From now on, the step after `at` asks for more memory than there is address space."""
    import torch

    from tbf.train.trainer import Trainer

    make = Trainer.__init__

    def make_with_hook(trainer: Trainer, **arguments: object) -> None:
        make(trainer, **arguments)

        def hook(*_: object) -> None:
            if trainer.step == at and trainer.engine.training:
                board.set(changes=1)
                torch.empty(1 << 46)

        trainer.engine.module.layers[0].register_forward_hook(hook)

    Trainer.__init__ = make_with_hook


def stopped_ranks(runs: Runs, straight: Path, draw: random.Random, times: int) -> Tally:
    """SIGTERM to one of two ranks: both save and leave, and the resumed run equals one that was never stopped."""
    tally = Tally("SIGTERM to one rank of two", "both save, exit 143; the finished run is bitwise equal")
    for number in range(times):
        name, board, victim = f"term-{number}", Board(), draw.randrange(2)
        children = runs.start_ranks(name, board=board)
        while board.step < 0 and children[0].wait(0) is None:
            time.sleep(0.001)
        children[0].wait(draw.uniform(0.0, 0.3))
        children[victim].send(signal.SIGTERM)
        sent = time.monotonic()
        codes = [child.wait() for child in children]
        seconds = time.monotonic() - sent
        lost = board.step - newest(runs.folder / name)
        if codes != [143, 143] or lost:
            tally.record(f"exit codes {codes}, {lost} steps lost: {children[0].text()[-300:]}")
            continue
        again = [child.wait() for child in runs.start_ranks(name)]
        columns = ("step", "loss", "grad_norm", "val_loss")
        same = again == [0, 0] and metrics(runs.folder / name, *columns) == metrics(straight, *columns)
        tally.record("" if same else f"resumed: {again}", corrupt=not same, lost=lost, seconds=seconds)
    return tally
