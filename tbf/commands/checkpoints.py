"""`tbf checkpoints`: what checkpoints a run has, whether they are whole, and away with old ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbf.commands import add_verb

if TYPE_CHECKING:
    from tbf.checkpoints.folder import CheckpointFolder

EXAMPLES = """\
  tbf checkpoints runs/mini-1                          # what is there
  tbf checkpoints runs/mini-1 verify                   # read every file; exit code 4 when one is damaged
  tbf checkpoints runs/mini-1 prune --keep-last 2 --keep-best 1
  tbf checkpoints runs/mini-1 gather node2:/data/runs/mini-1   # the other machines' part, where no folder is shared
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "checkpoints", run, summary="list, verify, prune or gather a run's checkpoints", examples=EXAMPLES,
        about="Pruning never touches a run that is training, nor counts a damaged checkpoint among those it keeps.",
    )  # fmt: skip
    parser.add_argument("run_dir", metavar="RUN", help="run folder")
    parser.add_argument("action", nargs="?", choices=("list", "verify", "prune", "gather"), default="list")
    parser.add_argument("sources", nargs="*", metavar="HOST:RUN", help="gather: run folders of the other machines")
    parser.add_argument("--keep-last", type=int, default=2, metavar="N", help="prune: newest healthy ones (2)")
    parser.add_argument("--keep-best", type=int, default=1, metavar="N", help="prune: by validation loss (1)")


def run(arguments: argparse.Namespace) -> int:
    from tbf.checkpoints.folder import CheckpointFolder
    from tbf.errors import CheckpointError, ConfigError

    root = Path(arguments.run_dir) / "checkpoints"
    folder = CheckpointFolder(root)
    if not folder.names():
        raise CheckpointError(f"{root} holds no checkpoint; is {arguments.run_dir} the folder of a run?")
    if arguments.action == "gather":
        return _gather(arguments, root)
    if arguments.sources:
        raise ConfigError(f"'{arguments.sources[0]}' means nothing to {arguments.action}")
    if arguments.action == "prune":
        return _prune(arguments, root)
    return _verify(folder) if arguments.action == "verify" else _list(folder)


def _list(folder: CheckpointFolder) -> int:
    from tbf.checkpoints.folder import by_loss

    entries = {path.name: manifest for path, manifest in folder.entries()}
    best = next((path.name for path, _ in by_loss(folder.entries())), None)
    print(f"{'checkpoint':16}{'saved (UTC)':22}{'GB':>8}{'ranks':>7}{'ZeRO':>6}{'validation loss':>17}")
    for name in folder.names():
        if name not in entries:
            print(f"{name:16}no readable manifest: not a complete checkpoint")
            continue
        found = entries[name]
        loss = "" if found.val_loss is None else f"{found.val_loss:.4f}"
        note = ("  best" if name == best else "") + ("" if found.healthy else "  unhealthy: saved while steps failed")
        if found.elsewhere:
            note += f"  {len(found.elsewhere)} files on other machines (gather)"
        print(f"{name:16}{found.saved_at[:19]:22}{found.total_bytes / 1e9:>8.2f}{found.world_size:>7}"
              f"{found.zero_stage:>6}{loss:>17}{note}")  # fmt: skip
    return 0


def _verify(folder: CheckpointFolder) -> int:
    from tbf.errors import CheckpointError

    damaged = 0
    for name in folder.names():
        try:
            manifest = folder.verify(folder.root / name)
            print(f"{name}: whole, {len(manifest.files)} files, {manifest.total_bytes / 1e9:.2f} GB")
        except CheckpointError as error:
            damaged += 1
            print(f"{name}: DAMAGED: {error}")
    return CheckpointError.exit_code if damaged else 0


def _gather(arguments: argparse.Namespace, root: Path) -> int:
    from tbf.checkpoints.files import run_lock
    from tbf.checkpoints.gathering import gather
    from tbf.errors import CheckpointError, ConfigError

    if not arguments.sources:
        raise ConfigError("gather needs the run folders of the other machines, e.g. node2:/data/runs/mini-1")
    with run_lock(Path(arguments.run_dir)):
        still = gather(root, arguments.sources)
    for name, missing in still.items():
        print(f"{name}: " + (f"still missing {', '.join(missing)}" if missing else "complete"))
    return CheckpointError.exit_code if any(still.values()) else 0


def _prune(arguments: argparse.Namespace, root: Path) -> int:
    from tbf.checkpoints.files import run_lock
    from tbf.train.checkpoint import CheckpointStore

    with run_lock(Path(arguments.run_dir)):
        store = CheckpointStore(root, arguments.keep_last, arguments.keep_best)
        before = store.names()
        store.prune()
        gone = [name for name in before if name not in store.names()]
    print(f"removed {', '.join(gone) if gone else 'nothing'}; {len(before) - len(gone)} left")
    return 0
