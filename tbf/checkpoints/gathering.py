"""Brings together checkpoints whose files lie on several machines, because their run folder was not shared."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tbf.checkpoints.files import hash_file, sync_folder
from tbf.checkpoints.folder import CheckpointFolder
from tbf.checkpoints.manifest import MANIFEST_NAME, Manifest
from tbf.errors import CheckpointError

_STAGE = ".gathering"
_SCP = ("scp", "-q", "-p", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def gather(root: Path, sources: Sequence[str]) -> dict[str, list[str]]:
    """Copies into `root` (a run's checkpoints/) what other machines hold of its checkpoints.

    Args:
        sources: run folders as `HOST:PATH`, fetched with scp, or as paths of this machine.

    Returns the files that are still missing, by checkpoint. May be called again after an interruption. Raises
    CheckpointError when a source cannot be read, or gives a file that is not what was saved.
    """
    still = {}
    for path, manifest in CheckpointFolder(root).entries():
        for source in sources:
            if manifest.elsewhere:
                manifest = _take(path, manifest, source)
        still[path.name] = sorted(manifest.elsewhere)
    return still


def _take(folder: Path, manifest: Manifest, source: str) -> Manifest:
    """Fetches what `source` has of a checkpoint; returns the manifest that includes it."""
    stage = folder.parent / f"{_STAGE}-{folder.name}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        for name in _fetch(source, folder.name, list(manifest.elsewhere), stage):
            if hash_file(stage / name) != manifest.elsewhere[name]:
                raise CheckpointError(f"{source} has another {name} of {folder.name} than was saved; is it that run's?")
        found = {path.name for path in stage.iterdir()}
        files = {**manifest.files, **{name: manifest.elsewhere[name] for name in found}}
        rest = {name: record for name, record in manifest.elsewhere.items() if name not in found}
        whole = dataclasses.replace(manifest, files=files, elsewhere=rest)
        for name in found:
            (stage / name).replace(folder / name)
        whole.write(stage)
        (stage / MANIFEST_NAME).replace(folder / MANIFEST_NAME)
        sync_folder(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return whole


def _fetch(source: str, checkpoint: str, names: list[str], stage: Path) -> list[str]:
    host, _, path = source.partition(":")
    if not path or "/" in host:
        there = Path(source) / "checkpoints" / checkpoint
        found = [name for name in names if (there / name).is_file()]
        for name in found:
            shutil.copy2(there / name, stage / name)
        return found
    if not re.fullmatch(r"\w[\w.@-]*", host):
        raise CheckpointError(f"'{host}' is no host name; write HOST:RUN_FOLDER")
    for name in names:  # one by one: a host has only its own ranks' files
        line = [*_SCP, "--", f"{host}:{path}/checkpoints/{checkpoint}/{name}", str(stage / name)]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode != 0 and "No such file" not in done.stderr:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"cannot copy from {source}: {last}")
    return [name for name in names if (stage / name).is_file()]
