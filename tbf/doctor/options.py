"""What the user asked `tbf doctor` to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tbf.system import cache_root


@dataclass(frozen=True)
class Options:
    """`nvme`: the folder that ZeRO-Infinity would use. `build`: compile the host Adam for real. `data`: a prepared
    folder, to be the same on every machine of the hostfile."""

    nvme: Path | None = None
    hostfile: Path | None = None
    build: bool = False
    kernels: bool = True
    port: int = 29500
    data: Path | None = None

    @property
    def disk(self) -> Path:
        """The folder whose speed is measured."""
        return self.nvme or cache_root()
