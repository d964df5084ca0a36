"""Training processes that start within a second: forked from a parent that has imported everything.

The parent has no other thread, no process group and no engine when it forks, so a child is what a fresh process is once
its imports are done: it goes through the whole of launch/train.py from there. Faults are put into the child.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tbf.data.workers import end_with_parent
from tests.helpers.runs import DS_ZERO2, metrics, write_preset

SAVE_EVERY = 3
STEPS = 12
SMALL = ["model.num_layers=2", "model.num_loops=1", "model.layer_pattern=[retnet, titan_attn]", "model.hidden_size=16",
         "model.mamba_head_dim=8", "model.factorized_embedding_dim=8", "model.dropout=0.1",
         "train.rehearse=false"]  # fmt: skip


def warm_up() -> None:
    """Imports, and asks the machine, what every child would."""
    import cpuinfo
    import torch

    torch.set_num_threads(1)
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # DeepSpeed asks three times, a second each
    for module in ("pyarrow.compute", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "tbf.train.run"):
        importlib.import_module(module)
    from tbf.train.build_ops import prepare_ops

    prepare_ops(True, lambda text: None)


def only_one_thread() -> None:
    """Raises AssertionError where a fork would leave threads, and locks that they hold, behind."""
    threads = [path.joinpath("comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # pyarrow's, made for being forked
    assert len(threads) == 1, f"threads {threads}: a fork would not carry them over"


class Board:
    """Numbers that a child leaves where a kill -9 cannot take them."""

    NAMES = ("resumed", "step", "saved", "changes")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))
        self.set(resumed=-1, step=-1, saved=-1, changes=0)

    def set(self, **values: int) -> None:
        for name, value in values.items():
            struct.pack_into("q", self._memory, 8 * self.NAMES.index(name), value)

    def __getattr__(self, name: str) -> int:
        if name not in Board.NAMES:
            raise AttributeError(name)
        return struct.unpack_from("q", self._memory, 8 * self.NAMES.index(name))[0]


class Child:
    """A forked process that runs `work` and leaves with the code that it returns."""

    def __init__(self, work: Callable[[], int], log: Path) -> None:
        self.log, self.code = log, None
        sys.stdout.flush()
        self.started = time.monotonic()
        only_one_thread()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                end_with_parent(parent)
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                os._exit(code)

    def wait(self, seconds: float = 120.0) -> int | None:
        """The exit code (negative: a signal's number), or None when it still runs after that time."""
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.started
            elif time.monotonic() >= until:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def end(self) -> int:
        """Kills it if need be."""
        if self.wait(0) is None:
            self.send(signal.SIGKILL)
        return self.wait(30)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Runs:
    """Runs of one tiny model in a folder, all equal but for what happens to them."""

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        """`cache` holds prepared data of other such runs."""
        self.folder, self.cache = folder, cache or folder / "data"
        self.preset = write_preset(
            folder, max_steps=STEPS, save_every=SAVE_EVERY, eval_every=2 * SAVE_EVERY, keep_last=2
        )
        self.preset.write_text(self.preset.read_text().replace(str(folder / "data"), str(self.cache)))

    def start(
        self,
        name: str,
        *overrides: str,
        board: Board | None = None,
        before: Callable[[], object] = lambda: None,
        rank: int = 0,
        ranks: int = 1,
        port: int = 0,
    ) -> Child:
        """Trains in `name`, from its newest checkpoint if it has one; `before` is called in the child first."""
        line = ["--ds_config", DS_ZERO2, "--preset", self.preset, "--run-dir", self.folder / name]
        line += [word for override in (*SMALL, *overrides) for word in ("--set", override)]

        def work() -> int:
            from tbf.errors import run_program
            from tbf.train.environment import discover_process
            from tbf.train.run import train

            random.seed(0)  # nothing of tbf draws from it, but its state is saved
            if ranks > 1:
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
                os.environ.update({key: str(value) for key, value in where.items()})
            if board is not None:
                report_to(board)
            before()
            sys.argv = ["train.py", *map(str, line)]
            program = importlib.import_module("launch.train")
            return run_program(lambda: train(program.parse_arguments(), discover_process(), 1, "-", "for the suite"))

        return Child(work, self.folder / f"{name.replace('/', '-')}.rank{rank}.log")

    def start_ranks(
        self, name: str, *overrides: str, before: Sequence[Callable[[], object]] = (lambda: None,) * 2, **more: object
    ) -> list[Child]:
        """Two ranks of one run."""
        from tests.helpers.gloo import _free_port

        port = _free_port()
        half = ("train.micro_batch_size=2", *overrides)
        return [
            self.start(name, *half, before=before[rank], rank=rank, ranks=2, port=port, **more) for rank in range(2)
        ]


def report_to(board: Board) -> None:
    """Lets this process write down how far it has come."""
    from tbf.train.checkpoint import CheckpointStore
    from tbf.train.trainer import Trainer

    step, commit = Trainer.train_step, CheckpointStore._commit

    def told_step(trainer: Trainer, steps: object) -> object:
        if board.resumed < 0:
            board.set(resumed=trainer.step)
        metrics = step(trainer, steps)
        board.set(step=trainer.step)
        return metrics

    def told_commit(store: CheckpointStore, aside: Path, final: Path, manifest: object, *more: object) -> None:
        commit(store, aside, final, manifest, *more)
        board.set(saved=manifest.step)

    Trainer.train_step, CheckpointStore._commit = told_step, told_commit


def newest(run_dir: Path) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    from tbf.checkpoints.folder import CheckpointFolder
    from tbf.errors import CheckpointError

    folder = CheckpointFolder(run_dir / "checkpoints")
    for path, manifest in folder.entries():
        with contextlib.suppress(CheckpointError):
            folder.verify(path)
            return manifest.step
    return 0


def difference(run_dir: Path, straight: Path, rows: str = "all") -> str:
    """In what a finished run differs from an undisturbed one, bitwise; empty: in nothing.

    The last checkpoint's files are compared value by value: weights, optimizer, random generators, data cursor, guard.
    `rows="some"` lets rows of metrics.csv be absent, which is written only while the disk has room.
    """
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    if not (run_dir / last / "manifest.json").exists():
        return "its last checkpoint is missing"
    names = sorted(path.name for path in (straight / last).iterdir() if path.name != "manifest.json")
    differing = [name for name in names if not _same(_read(run_dir / last / name), _read(straight / last / name))]
    if differing:
        return f"{', '.join(differing)} of the last checkpoint differ"
    ours, theirs = (metrics(run, "step", "loss", "grad_norm", "val_loss") for run in (run_dir, straight))
    strange = [row for row in ours if row not in theirs]
    if strange or (rows == "all" and ours != theirs):
        return f"metrics.csv differs: {strange[:1] or f'{len(ours)} rows instead of {len(theirs)}'}"
    return ""


def _read(path: Path) -> object:
    from tbf.train.deepspeed_io import DurableCheckpointEngine

    return DurableCheckpointEngine().load(str(path), "cpu") if path.suffix == ".pt" else json.loads(path.read_bytes())


def _same(ours: object, theirs: object) -> bool:
    """Whether two trees hold the same values, tensors bit for bit."""
    import torch

    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return ours == theirs if isinstance(theirs, str | int | float | bool | None) else vars(ours) == vars(theirs)
