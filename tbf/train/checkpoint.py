"""Saving and loading a run's checkpoints, so that a crash at any moment leaves the previous one intact.

A save is written into a hidden folder beside its final place, every file synced and hashed, the manifest last; one
rename makes it a checkpoint. What a killed save or deletion leaves behind is hidden, and swept by the next one.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tbf
from tbf.checkpoints import ranks
from tbf.checkpoints.files import (
    FileRecord,
    free_bytes,
    move_folder,
    remove_folder,
    sync_folder,
    to_json,
    write_atomic,
    write_durable,
)
from tbf.checkpoints.folder import CheckpointFolder, Entry, by_loss, folder_name, step_of
from tbf.checkpoints.manifest import MANIFEST_NAME, Manifest, flatten
from tbf.checkpoints.storage import Storage
from tbf.errors import CheckpointError, ConfigError
from tbf.train.background import BackgroundSave, memory_for_a_copy
from tbf.train.rng import load_rng, rng_bytes

if TYPE_CHECKING:
    from tbf.train.deepspeed_io import EngineFacts

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
_SAVING, _DELETING, _SUPERSEDED = ".saving-", ".deleting-", "superseded-"
_SPARE_BYTES = 64 << 20  # logs and metrics must still fit beside a checkpoint


class CheckpointStore(CheckpointFolder):
    """The checkpoints of a run in training. Every method except `entries`, `sweep` and `prune` is collective."""

    def __init__(
        self,
        root: Path,
        keep_last: int = 2,
        keep_best: int = 1,
        *,
        fingerprint: str = "",
        storage: Storage | None = None,
    ) -> None:
        """`fingerprint` hashes what a resumed run shares with the saved one besides its model (data order, seed).

        Raises ConfigError when fewer than two checkpoints would be kept.
        """
        if keep_last < 2:
            raise ConfigError(f"keep_last is {keep_last}; keep at least 2, since the newest may turn out damaged")
        if keep_best < 0:
            raise ConfigError(f"keep_best is {keep_best}; use 0 or more")
        super().__init__(root, storage)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.fingerprint = fingerprint
        self._last_step: int | None = None  # of the checkpoint in `root` that this run last loaded or saved
        self._saving: BackgroundSave | None = None
        self._told = False

    def prepare(self, engine: Any, rank: int) -> None:
        """Raises CheckpointError at the start of a run when its first checkpoint could not be saved."""
        from tbf.train.deepspeed_io import engine_facts

        facts = engine_facts(engine)
        with ranks.together(f"cannot write to {self.root}"):
            if self.storage.leads(rank):
                self._make_ready(facts)

    def save(
        self,
        engine: Any,
        step: int,
        state: dict[str, Any],
        rank: int,
        world_size: int,
        val_loss: float | None = None,
        *,
        healthy: bool = True,
        background: bool = False,
    ) -> Path:
        """Writes a checkpoint of all ranks and returns its folder; then drops what rotation no longer keeps.

        `background` copies the state into host memory and leaves the writing to a thread, where memory allows: the
        checkpoint is complete, or its CheckpointError raised, when `finish` returns; `save` and `load` call it first.

        `state` is the trainer's own, plain JSON values, equal on all ranks; `val_loss` the validation loss of exactly
        this step; `healthy=False` keeps it out of the rotation's count. A step that was just loaded or saved is not
        written again. Raises CheckpointError, the same on every rank, and leaves the earlier checkpoints alone.
        """
        from tbf.train.deepspeed_io import engine_facts, save_engine

        final = self.root / folder_name(step)
        self.finish()
        if step == self._last_step:
            return final
        started, before = time.monotonic(), self._last_step
        trainer_state = to_json(state)
        facts = engine_facts(engine)
        aside = self.root / f"{_SAVING}{step}" / final.name
        leads = self.storage.leads(rank)
        with ranks.together(f"cannot write to {self.root}"):
            if leads:
                self._make_ready(facts)
                aside.mkdir(parents=True)
        background = background and self._can_copy(facts, world_size)

        try:
            with ranks.together(f"cannot save {final}"):
                if not aside.is_dir():
                    raise CheckpointError(
                        f"{aside} was made by rank {self.storage.members[0]} but cannot be seen here; "
                        "is the file system of the run folder still mounted?"
                    )
                contents = {f"rng_rank{rank}.pt": rng_bytes(), **({STATE_NAME: trainer_state} if leads else {})}
            weights = None if self.storage.shared else leads
            io = save_engine(engine, aside, {"tbf": {"step": step}}, weights, later=background)

            def write() -> dict[str, FileRecord]:
                io.write()
                if io.problem:
                    raise CheckpointError(io.problem)
                return io.records | {name: write_durable(aside / name, data) for name, data in contents.items()}

            def commit(parts: list[dict[str, FileRecord]]) -> None:
                files = {name: record for member in self.storage.members for name, record in parts[member].items()}
                others = {name: record for part in parts for name, record in part.items() if name not in files}
                manifest = self._describe(engine, facts, step, world_size, val_loss, healthy, files, others)
                self._commit(aside, final, manifest, before)
                size, seconds = manifest.total_bytes / 1e9, time.monotonic() - started
                logger.info("saved %s: %.2f GB in %.1f s", final, size, seconds)

            self._last_step = step
            if background:
                self._saving = BackgroundSave(step, aside, rank, world_size, write, commit)
                return final
            with ranks.together(f"cannot save {final}"):
                records = write()
            parts = ranks.gather(records)
            with ranks.together(f"cannot save {final}"):
                if leads:
                    commit(parts)
        except CheckpointError:
            self._last_step = before
            if leads:
                shutil.rmtree(aside.parent, ignore_errors=True)
            raise
        return final

    def finish(self) -> None:
        """Waits for a save in the background. Collective while there is one. Raises CheckpointError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.finish()

    def let_go(self) -> None:
        """Ends a save in the background of a run that failed, without the other ranks."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.let_go()

    def _can_copy(self, facts: EngineFacts, world_size: int) -> bool:
        """Whether to save in the background; says once why not."""
        why = "" if self.storage.shared else "machines write to disks of their own"
        if not why and not memory_for_a_copy(self._size(facts), world_size):
            why = f"no memory for a copy of the state ({self._size(facts) / 1e9:.1f} GB)"
        if why and not self._told:
            self._told = True
            logger.warning("train.save_in_background: %s; checkpoints are written while training waits", why)
        return not why

    def load(self, engine: Any, which: str | int | Path, rank: int, world_size: int) -> dict[str, Any]:
        """Restores weights, optimizer and random generators on every rank; returns the state given to `save`.

        `which` is a checkpoint's path (of this or another run), or what `find` takes. Everything is verified first.
        One of another number of ranks, ZeRO stage or optimizer class is converted while it is read, into a fresh
        engine only: equal but for rounding, instead of bitwise. Raises CheckpointError when the checkpoint is damaged
        or belongs to another model or configuration.
        """
        from tbf.train.deepspeed_io import engine_facts, load_engine
        from tbf.train.swapped import swaps

        self.finish()
        path = Path(which)
        if isinstance(which, int) or str(which) in ("latest", "best") or str(which).isdecimal():
            path = self.find(which)
        manifest = self.verify(path)
        check_fits(manifest, engine, path, self.fingerprint)
        differing = other_shape(manifest, engine_facts(engine), world_size)
        by_name = bool(differing) or swaps(engine)
        with ranks.together(f"cannot read {path}"):
            state = _read_state(path / STATE_NAME)
        if by_name and manifest.elsewhere:
            why = f"was saved otherwise ({differing})" if differing else "goes to NVMe"
            raise CheckpointError(
                f"{path} {why}, and other machines hold {len(manifest.elsewhere)} of its files: bring them together "
                "first (tbf checkpoints RUN gather NODE:RUN), and give all nodes the result"
            )
        if differing:
            logger.warning("%s was saved otherwise (%s): converting it, equal but for rounding", path, differing)
        if by_name:
            self._load_reshaped(engine, path)
        else:
            load_engine(engine, path)
        with ranks.together(f"cannot read {path}"):
            if (path / f"rng_rank{rank}.pt").exists():
                load_rng(path / f"rng_rank{rank}.pt")
            else:
                torch.manual_seed(hash((manifest.step, rank)))  # a rank that was not there before
        if path.resolve().parent == self.root.resolve():
            self._last_step = manifest.step
        return state

    def last_healthy(self) -> Path | None:
        self.finish()
        return super().last_healthy()

    def _load_reshaped(self, engine: Any, path: Path) -> None:
        from tbf.train.reshape import load_reshaped

        problem = None
        try:
            load_reshaped(engine, path)
        except CheckpointError as error:
            problem = error
        ranks.raise_together(problem)

    def sweep(self) -> None:
        """Removes what a killed save or deletion left behind. Only for the process that owns the run folder."""
        for leftover in (*self.root.glob(f"{_SAVING}*"), *self.root.glob(f"{_DELETING}*")):
            logger.info("removing %s, left by an interrupted save or deletion", leftover)
            remove_folder(leftover, first=MANIFEST_NAME)
        for temporary in self.root.glob(".*.tmp-*"):
            temporary.unlink()

    def prune(self) -> None:
        """Deletes damaged checkpoints and those that rotation would not keep; nothing where none is whole. Local."""
        self.sweep()
        whole = []
        for path, manifest in self.entries():
            try:
                self.verify(path)
                whole.append((path, manifest))
            except CheckpointError as error:
                logger.warning("not counted: %s", error)
        if not whole:
            raise CheckpointError(f"no checkpoint in {self.root} is whole; nothing was removed")
        kept = self._kept(whole)
        for path in self._folders():
            if path not in kept:
                self._delete(path)

    def _make_ready(self, facts: EngineFacts) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if self._last_step is None and self._folders():
            raise CheckpointError(
                f"{self.root} holds checkpoints (newest {self._folders()[0].name}) that this run did not resume from "
                "and would rotate away; pass --resume auto, or another --run-dir"
            )
        self.sweep()
        needed = int(self._size(facts) * 1.05) + _SPARE_BYTES
        free = free_bytes(self.root)
        if free < needed:
            raise CheckpointError(
                f"a checkpoint needs {needed / 1e9:.2f} GB and {self.root} has {free / 1e9:.2f} GB free; "
                "free some space, lower train.keep_last or train.keep_best, or pass another --run-dir"
            )

    def _size(self, facts: EngineFacts) -> int:
        """Bytes of a checkpoint: as the last one had, or FP32 weights, master weights and two Adam moments."""
        same = [manifest.total_bytes for _, manifest in self.entries() if manifest.layout == facts.layout]
        return same[0] if same else 16 * facts.parameters

    def _describe(
        self,
        engine: Any,
        facts: EngineFacts,
        step: int,
        world_size: int,
        val_loss: float | None,
        healthy: bool,
        files: dict[str, FileRecord],
        elsewhere: dict[str, FileRecord],
    ) -> Manifest:
        import deepspeed

        return Manifest(
            step=step,
            val_loss=val_loss,
            healthy=healthy and (val_loss is None or math.isfinite(val_loss)),
            world_size=world_size,
            zero_stage=facts.zero_stage,
            optimizer=facts.optimizer,
            layout=facts.layout,
            model=flatten(engine.module.config.to_dict()),
            fingerprint=self.fingerprint,
            versions={
                "tbf": tbf.__version__,
                "torch": str(torch.__version__),
                "deepspeed": deepspeed.__version__,
                "python": platform.python_version(),
            },
            saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            files=files,
            elsewhere=elsewhere,
        )

    def _commit(self, aside: Path, final: Path, manifest: Manifest, before: int | None) -> None:
        sync_folder(aside)
        manifest.write(aside)
        sync_folder(aside)
        self._set_aside_newer(before)
        move_folder(aside, final)  # from here on it counts
        aside.parent.rmdir()
        entries = self.entries()
        best = [{"checkpoint": p.name, "step": m.step, "val_loss": m.val_loss} for p, m in by_loss(entries)]
        write_atomic(self.root / "latest", f"{final.name}\n".encode())
        write_atomic(self.root / "best.json", to_json(best[: max(self.keep_best, 1)]))
        self._rotate(entries)

    def _set_aside_newer(self, step: int | None) -> None:
        """Hides checkpoints of a future that a resume from an earlier step gave up; rotation deletes them."""
        for folder in self._folders():
            if step is not None and step_of(folder) > step:
                hidden = self.root / f"{_SUPERSEDED}{folder.name}"
                if hidden.exists():
                    self._delete(hidden)
                logger.warning("%s is newer than step %d, from which this run resumed: dropped", folder, step)
                move_folder(folder, hidden)

    def _rotate(self, entries: list[Entry]) -> None:
        kept = self._kept(entries)
        dropped = [path for path, _ in entries if path not in kept]
        try:
            for path in [*dropped, *self.root.glob(f"{_SUPERSEDED}*")]:
                self._delete(path)
        except OSError as error:  # the new checkpoint is safe: a leftover only costs space
            logger.warning("cannot delete an old checkpoint: %s", error)

    def _kept(self, entries: list[Entry]) -> set[Path]:
        """The newest one, the last healthy ones and the best ones."""
        healthy = [path for path, manifest in entries if manifest.healthy]
        best = [path for path, _ in by_loss(entries)]
        return {entries[0][0], *healthy[: self.keep_last], *best[: self.keep_best]}

    def _delete(self, folder: Path) -> None:
        hidden = self.root / f"{_DELETING}{folder.name}"
        move_folder(folder, hidden)
        remove_folder(hidden, first=MANIFEST_NAME)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); use another checkpoint") from None


def check_fits(manifest: Manifest, engine: Any, path: Path, fingerprint: str) -> None:
    """Raises CheckpointError when the checkpoint at `path` is of another model or of a run with other data."""
    here, saved = flatten(engine.module.config.to_dict()), manifest.model
    differing = sorted(key for key in here.keys() | saved.keys() if here.get(key) != saved.get(key))
    if differing:
        shown = ", ".join(f"{key} {saved.get(key)} there, {here.get(key)} here" for key in differing[:3])
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{path} belongs to another model ({shown}{more}); resume with that run's own config.yaml as --preset, "
            "or choose another --run-dir"
        )
    if fingerprint and manifest.fingerprint and manifest.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path} belongs to a run with other data settings or another seed; resume with that run's own "
            f"config.yaml as --preset, or export its weights (tools/convert_ckpt.py {path} OUT) and start a new run "
            "from them"
        )


def other_shape(manifest: Manifest, facts: EngineFacts, world_size: int) -> str:
    """In what this engine stores its state otherwise than the checkpoint; empty: it can take over the files as is."""
    pairs = [
        ("rank(s)", manifest.world_size, world_size),
        ("as ZeRO stage", manifest.zero_stage, facts.zero_stage),
        ("optimizer", manifest.optimizer, facts.optimizer),
    ]
    differing = [f"{what} {there} there, {here} here" for what, there, here in pairs if there != here]
    if manifest.layout != facts.layout and manifest.zero_stage == facts.zero_stage:
        differing.append("parameters in another order")
    return "; ".join(differing)
