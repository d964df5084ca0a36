"""The manifest of a checkpoint: what it belongs to, and the length and hash of every file in it.

Written last, so that a folder with a good manifest is a complete checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tbf.checkpoints.files import FileRecord, hash_file, to_json, write_durable
from tbf.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

SAFE_CLASSES = frozenset(
    {
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    }
)
"""The only classes beyond torch's own that DeepSpeed's files need; anything else is refused."""


@dataclass(frozen=True)
class Manifest:
    """One checkpoint's description."""

    step: int
    """Optimizer steps taken."""
    val_loss: float | None
    """Validation loss of exactly this step, nats per masked token; None when it was not evaluated here."""
    healthy: bool
    """False when it was saved while the run misbehaved: kept for diagnosis only as long as it is the newest."""
    world_size: int
    zero_stage: int
    optimizer: str
    """Class that owns the optimizer state; another one stores it differently."""
    layout: str
    """Hash of the order and shapes in which the parameters lie in the flat optimizer state."""
    model: dict[str, Any]
    """The model's configuration, flat, with dotted keys."""
    fingerprint: str
    """Of the run's other settings that a resumed run shares; empty: not known, not compared."""
    versions: dict[str, str]
    saved_at: str
    """UTC, ISO 8601; for people only: no decision rests on a clock."""
    files: dict[str, FileRecord]
    elsewhere: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    """Files of the same checkpoint that other machines hold, where the run folder is not shared."""

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def write(self, folder: Path) -> None:
        body = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_durable(folder / MANIFEST_NAME, to_json({**body, "sha256": _body_hash(body)}))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks a manifest. Raises CheckpointError when it is missing, cut short or altered."""
        path = folder / MANIFEST_NAME
        try:
            body = json.loads(path.read_bytes())
            stated = body.pop("sha256")
            version = body.pop("format")
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: it is not a complete checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, AttributeError, KeyError, TypeError):
            raise CheckpointError(f"{path} is cut short or not a manifest; use another checkpoint") from None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {version!r}, this tbf reads {FORMAT_VERSION}; use the tbf that wrote it"
            )
        if stated != _body_hash({"format": version, **body}):
            raise CheckpointError(f"{path} was altered: its own hash does not match; use another checkpoint")
        try:
            files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
            elsewhere = {name: FileRecord(**record) for name, record in body.pop("elsewhere", {}).items()}
            manifest = cls(files=files, elsewhere=elsewhere, **body)
        except (TypeError, AttributeError, KeyError):
            raise CheckpointError(f"{path} lacks entries or has unknown ones; use another checkpoint") from None
        strays = [name for name in (*files, *elsewhere) if Path(name).name != name]
        if strays:
            raise CheckpointError(f"{path} names {strays[0]!r}, which lies outside the checkpoint; refused")
        return manifest

    def missing_files(self, folder: Path) -> list[str]:
        """Returns what is wrong at a glance: files that are absent, or weights that the manifest does not know."""
        unknown = {path.name for path in folder.glob("*.pt")} - self.files.keys()
        return [f"{name} is missing" for name in sorted(self.files) if not (folder / name).is_file()] + [
            f"{name} is not in the manifest" for name in sorted(unknown)
        ]

    def problem_with(self, folder: Path, name: str) -> str | None:
        """Reads one file through and returns what is wrong with it, or None."""
        path, expected = folder / name, self.files[name]
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                return f"{name} has {size:,} bytes instead of {expected.bytes:,}"
            if hash_file(path) != expected:
                return f"{name} was altered: its SHA-256 does not match"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return unsafe_content(path) if path.suffix == ".pt" else None

    def share(self, rank: int, world_size: int) -> list[str]:
        """The files that one of `world_size` ranks checks, so that each is read once and the large ones are spread."""
        by_size = sorted(self.files, key=lambda name: (-self.files[name].bytes, name))
        return by_size[rank::world_size]


def unsafe_content(path: Path) -> str | None:
    """Returns why a torch file must not be loaded (it would run code, or is no torch file), or None.

    Reads the index of the archive only, so it costs the same for a file of any size.
    """
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - SAFE_CLASSES
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        return f"{path.name} is not a torch archive ({str(error).splitlines()[0]})"
    return f"{path.name} would run {', '.join(sorted(found))}" if found else None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, with values as JSON would return them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
