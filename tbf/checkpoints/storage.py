"""Which ranks see the same run folder: machines need not share a file system.

Where they do not, each machine holds its own ranks' part of every checkpoint, and `tbf checkpoints gather` joins them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from tbf.checkpoints import ranks


@dataclass(frozen=True)
class Storage:
    """The ranks that share this rank's folder, in rank order, and whether those are all of the job."""

    members: tuple[int, ...] = (0,)
    shared: bool = True

    def leads(self, rank: int) -> bool:
        """Whether this rank makes and renames folders for all that share it."""
        return rank == self.members[0]

    def place(self, rank: int) -> tuple[int, int]:
        """This rank's number among those that share the folder, and how many they are."""
        return self.members.index(rank), len(self.members)


def find_storage(folder: Path) -> Storage:
    """Finds out by a file of each rank that the others look for. Collective; makes the folder.

    Raises CheckpointError, the same on every rank, where the folder cannot be written to.
    """
    token = folder / f".lock-seen-{secrets.token_hex(8)}"
    with ranks.together(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    try:
        tokens = ranks.gather(token.name)
        seen = tuple(rank for rank, name in enumerate(tokens) if (folder / name).exists())
        everyone = ranks.gather(seen)
    finally:
        token.unlink(missing_ok=True)
    return Storage(seen, shared=all(len(members) == len(tokens) for members in everyone))
