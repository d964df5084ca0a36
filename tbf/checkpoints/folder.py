"""Reading a run's checkpoints: which there are, which is the newest or the best, and whether one is whole.

checkpoints/step-00000500/   DeepSpeed's files, rng_rank<r>.pt, trainer_state.json, manifest.json
            latest           name of the newest one, for people and other tools: the manifests decide
            best.json        the best ones by validation loss, likewise
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import TypeAlias

from tbf.checkpoints import ranks
from tbf.checkpoints.manifest import Manifest
from tbf.checkpoints.storage import Storage
from tbf.errors import CheckpointError

logger = logging.getLogger(__name__)

Entry: TypeAlias = tuple[Path, Manifest]


class CheckpointFolder:
    """A folder of checkpoints, read only.

    `latest`, `best`, `find` and `verify` are collective where a process group runs: every rank calls them, the
    hashing is shared out, and all get the same answer or the same CheckpointError. Alone they do all the work.
    """

    def __init__(self, root: Path, storage: Storage | None = None) -> None:
        """`storage`: which ranks see the same `root`; None: all of them."""
        self.root = Path(root)
        self._storage = storage
        self._verified: dict[Path, Manifest] = {}

    @property
    def storage(self) -> Storage:
        return self._storage or Storage(tuple(range(ranks.world_size())))

    def entries(self) -> list[Entry]:
        """Checkpoints with a readable manifest, newest first. Local and quick: no file is hashed."""
        found = []
        for path in self._folders():
            with contextlib.suppress(CheckpointError):
                found.append((path, Manifest.read(path)))
        return found

    def names(self) -> list[str]:
        """Names of all checkpoint folders, newest first, complete or not. Local."""
        return [path.name for path in self._folders()]

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint, or None where nothing was ever saved.

        A damaged one is reported and the one before is taken. Raises CheckpointError if all are damaged: starting
        from scratch instead would silently throw the run away.
        """
        folders = self._as_rank_0(self._folders())
        return self._first_whole(folders, "newest") if folders else None

    def last_healthy(self) -> Path | None:
        """Returns the newest whole checkpoint that was saved while the run was well, or None where there is none."""
        folders = self._as_rank_0([path for path, manifest in self.entries() if manifest.healthy])
        return self._first_whole(folders, "last healthy") if folders else None

    def best(self) -> Path:
        """Returns the whole checkpoint with the lowest validation loss. Raises CheckpointError if there is none."""
        folders = self._as_rank_0([path for path, _ in by_loss(self.entries())])
        if not folders:
            raise CheckpointError(f"no checkpoint in {self.root} has a validation loss; use latest or a step")
        return self._first_whole(folders, "best")

    def find(self, which: str | int) -> Path:
        """Returns the checkpoint named "latest", "best" or by its step, verified. Raises CheckpointError."""
        if which == "best":
            return self.best()
        if which == "latest":
            path = self.latest()
            if path is None:
                raise CheckpointError(f"{self.root} holds no checkpoint; check the path, or train first")
            return path
        if not str(which).isdecimal():
            raise CheckpointError(f"'{which}' names no checkpoint; use latest, best or a step such as 500")
        path = self.root / folder_name(int(which))
        if not ranks.from_rank_0(path.is_dir()):
            steps = ", ".join(str(step_of(folder)) for folder in reversed(self._folders())) or "none"
            raise CheckpointError(f"{self.root} has no checkpoint of step {which}; there are: {steps}")
        self.verify(path)
        return path

    def verify(self, folder: Path) -> Manifest:
        """Reads every file of a checkpoint against its manifest, once per instance.

        Raises CheckpointError that names what is missing, cut short, altered or unsafe to load.
        """
        folder = Path(folder)
        if folder in self._verified:
            return self._verified[folder]
        with ranks.together(f"cannot read {folder}"):
            manifest = Manifest.read(folder)
        problems = manifest.missing_files(folder)
        mine = [] if problems else manifest.share(*self.storage.place(ranks.this_rank()))
        problems += [problem for name in mine if (problem := manifest.problem_with(folder, name))]
        problems = list(dict.fromkeys(problem for part in ranks.gather(problems) for problem in part))
        if problems:
            raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}; use another checkpoint")
        self._verified[folder] = manifest
        return manifest

    def _first_whole(self, folders: list[Path], kind: str) -> Path:
        loud = logger.error if ranks.this_rank() == 0 else logger.debug
        for index, folder in enumerate(folders):
            try:
                self.verify(folder)
            except CheckpointError as error:
                loud("SKIPPING the %s checkpoint: %s", kind if index == 0 else f"next {kind}", error)
                continue
            if index > 0:
                loud("falling back to %s", folder)
            return folder
        raise CheckpointError(
            f"every checkpoint in {self.root} is damaged ({len(folders)} tried, see above); "
            "restore one from a copy, or start anew in another --run-dir"
        )

    def _as_rank_0(self, folders: list[Path]) -> list[Path]:
        """This rank's folders of the names that rank 0 found."""
        return [self.root / name for name in ranks.from_rank_0([folder.name for folder in folders])]

    def _folders(self) -> list[Path]:
        folders = [path for path in self.root.glob("step-*") if step_of(path) >= 0 and path.is_dir()]
        return sorted(folders, key=step_of, reverse=True)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; -1 for another name."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def by_loss(entries: list[Entry]) -> list[Entry]:
    """Healthy entries with a finite validation loss, lowest first; of equals the newer."""
    usable = [entry for entry in entries if entry[1].healthy and entry[1].val_loss is not None]
    return sorted((e for e in usable if math.isfinite(e[1].val_loss)), key=lambda entry: entry[1].val_loss)
