"""Saves beside training: a copy of the state in host memory first, then a thread that hashes, writes and syncs it.

The thread uses no collective: those belong to the main thread. Ranks meet in the folder that they write to instead:
each leaves a list of its files there once they are on the disk; rank 0 waits for all lists, and only then writes the
manifest and renames. `finish`, called by all ranks before the next save and at the end, brings errors to light.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tbf.checkpoints import ranks
from tbf.checkpoints.files import FileRecord, to_json, write_atomic
from tbf.errors import CheckpointError
from tbf.system import host_memory

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.02
_LOCAL_PATIENCE_S = 20.0

Records = dict[str, FileRecord]


def snapshot(value: Any, seen: dict[tuple, torch.Tensor] | None = None) -> Any:
    """A copy of a state tree on the host that later steps do not change; tensors that share memory are copied once."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        place = (
            value.untyped_storage()._cdata,
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
            value.dtype,
        )
        if place not in seen:
            seen[place] = value.detach().to("cpu", copy=True)
        return seen[place]
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the class and what it carries besides entries
        for key, entry in value.items():
            copied[key] = snapshot(entry, seen)
        return copied
    if isinstance(value, list):
        return [snapshot(entry, seen) for entry in value]
    if type(value) is tuple:
        return tuple(snapshot(entry, seen) for entry in value)
    return value


def memory_for_a_copy(state_bytes: int, world_size: int) -> bool:
    """Whether every node can hold a copy of its ranks' part of a checkpoint and a fifth more. Collective."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    needed, free = 1.2 * state_bytes * local / world_size, host_memory()[1]
    return all(ranks.gather(needed < free))


class BackgroundSave:
    """One checkpoint being written. Made on every rank, by the main thread; `finish` or `let_go` ends it."""

    def __init__(
        self,
        step: int,
        aside: Path,
        rank: int,
        world_size: int,
        write: Callable[[], Records],
        commit: Callable[[list[Records]], None],
    ) -> None:
        """`write` writes this rank's files into `aside`; `commit`, on rank 0, makes a checkpoint of
        all ranks' files, given in rank order."""
        self.step = step
        self.seconds = 0.0
        """That the thread took."""
        self._aside, self._rank, self._world_size = aside, rank, world_size
        self._write, self._commit = write, commit
        self._problem: CheckpointError | None = None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tbf-save", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def finish(self) -> None:
        """Waits for the end. Collective. Raises CheckpointError, the same on every rank."""
        self._written.wait()
        problem = next((found for found in ranks.gather(self._problem) if found), None)
        if problem is not None:
            self._given_up.set()
        self._thread.join()
        problem = problem or self._problem
        if problem is not None and self._rank == 0:
            shutil.rmtree(self._aside.parent, ignore_errors=True)
        ranks.raise_together(problem)

    def let_go(self) -> None:
        """The same at the end of a run that failed: alone, with patience, since other ranks may be gone."""
        self._thread.join(_LOCAL_PATIENCE_S)
        self._given_up.set()
        self._thread.join(_LOCAL_PATIENCE_S)
        if self._problem is not None:
            logger.error("%s", self._problem)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            records = self._write()
            self._write = None  # lets go of the copy
            mine = to_json({name: dataclasses.asdict(record) for name, record in records.items()})
            write_atomic(self._list_of(self._rank), mine)
            self._written.set()
            if self._rank == 0 and self._all_written():
                lists = [self._list_of(rank) for rank in range(self._world_size)]
                found = [json.loads(path.read_bytes()) for path in lists]
                for path in lists:
                    path.unlink()
                self._commit([{name: FileRecord(**record) for name, record in part.items()} for part in found])
        except CheckpointError as error:
            self._problem = error
        except OSError as error:
            self._problem = CheckpointError(f"cannot save {self._aside.name}: {error.filename or ''} {error.strerror}")
        except Exception as error:  # anything else must reach the main thread too
            self._problem = CheckpointError(f"cannot save {self._aside.name}: {type(error).__name__}: {error}")
        finally:
            self.seconds = time.monotonic() - started
            self._written.set()

    def _all_written(self) -> bool:
        while not all(self._list_of(rank).exists() for rank in range(self._world_size)):
            if self._given_up.wait(_LOOK_EVERY_S):
                return False
        return True

    def _list_of(self, rank: int) -> Path:
        return self._aside.parent / f"files-rank{rank}.json"
