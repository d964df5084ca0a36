"""Token shards: the on-disk form of a prepared corpus.

    DIR/plan.json           what is being prepared, written first; every later run must agree with it
    DIR/tokenizer/          the tokenizer that made the ids
    DIR/shard-00000.bin     token ids, uint16 or uint32, documents as [CLS] ... [SEP] one after another
    DIR/shard-00000.idx     uint64 token offsets [documents + 1], then uint64 text hashes [documents]
    DIR/shard-00000.json    counts and hashes; written last, so it marks the shard as finished
    DIR/shard-00000.dup     uint32 numbers of documents that an earlier shard already has (only where there are some)
    DIR/index.json          all of it, written at the end

Files are flat and little-endian, so they can be memory-mapped by anything; `FlatFile` reads them at given positions
instead, which keeps the resident memory of a reader flat and makes a cut file an error and not a SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tbf.data.files import read_json, sha256_file, write_json
from tbf.data.tokenizer import SpanishSPMTokenizer, token_dtype
from tbf.errors import DataError
from tbf.system import sync_folder

FORMAT = 1
PREPARE_AGAIN = "prepare the data again (`tbf data prepare`)"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


@dataclass
class ShardInfo:
    """What is known about one finished shard (`shard-*.json`, and a list in `index.json`)."""

    name: str
    source: str
    documents: int = 0
    tokens: int = 0
    """With [CLS] and [SEP]."""
    token_bytes: int = 2
    text_bytes: int = 0
    """UTF-8, after cleaning."""
    read_documents: int = 0
    """Before cleaning."""
    duplicates_elsewhere: int = 0
    """Documents that an earlier shard has too; left out of rows."""
    counts: dict[str, int] = field(default_factory=dict)
    """Per cleaning rule and kind of bad record."""
    bad_files: dict[str, str] = field(default_factory=dict)
    unknown_tokens: int = 0
    sha256: dict[str, str] = field(default_factory=dict)
    """Per file suffix."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, folder: Path, name: str) -> ShardInfo | None:
        """The info of a finished shard, None when it is missing or cut short."""
        path = folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            info = cls(**read_json(path, PREPARE_AGAIN))
            sizes = {"bin": info.tokens * info.token_bytes, "idx": (2 * info.documents + 1) * 8}
            complete = all((folder / f"{name}.{suffix}").stat().st_size == size for suffix, size in sizes.items())
        except (DataError, OSError, TypeError, ValueError):
            return None
        return info if complete else None


class FlatFile:
    """Reads values of one type at any position of a file. Not shared between processes: each opens its own."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` values from number `start`. Raises DataError when the file ends before."""
        size = self.dtype.itemsize
        data = os.pread(self._file, count * size, start * size)
        if len(data) != count * size:
            raise DataError(f"{self.path}: cut short at value {start + len(data) // size}; {PREPARE_AGAIN}")
        return np.frombuffer(data, self.dtype)

    def close(self) -> None:
        os.close(self._file)


def read_documents(folder: Path, shard: ShardInfo) -> tuple[np.ndarray, np.ndarray]:
    """(token offsets uint64 [documents + 1], text hashes uint64 [documents]) of a shard. Raises DataError when cut."""
    path = folder / f"{shard.name}.idx"
    try:
        values = np.fromfile(path, "<u8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None
    if len(values) != 2 * shard.documents + 1:
        raise DataError(f"{path}: cut short; {PREPARE_AGAIN}")
    return values[: shard.documents + 1], values[shard.documents + 1 :]


@dataclass(frozen=True)
class ShardIndex:
    """A prepared corpus as described by its `index.json`."""

    folder: Path
    vocab_size: int
    tokenizer: str
    """Fingerprint."""
    sources: tuple[dict[str, Any], ...]
    """`name` and `weight` (None: by size)."""
    shards: tuple[ShardInfo, ...]
    complete: bool
    """False when preparation stopped before the end (disk budget); what is there is usable."""
    note: str = ""

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @property
    def documents(self) -> int:
        return sum(shard.documents - shard.duplicates_elsewhere for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def key(self) -> str:
        """Changes when any token or document does."""
        return hashlib.sha256(
            "".join(s.sha256["bin"] + s.sha256.get("dup", "") for s in self.shards).encode()
        ).hexdigest()

    @classmethod
    def read(cls, folder: str | Path) -> ShardIndex:
        """Reads `index.json`. Raises DataError when it is missing, malformed or of a newer format."""
        folder = Path(folder)
        value = read_json(folder / "index.json", PREPARE_AGAIN)
        try:
            if value["format"] > FORMAT:
                raise DataError(
                    f"{folder}: shards of format {value['format']}, this tbf reads up to {FORMAT}; "
                    "upgrade tbf or prepare the data again"
                )
            return cls(
                folder,
                value["vocab_size"],
                value["tokenizer"],
                tuple(value["sources"]),
                tuple(ShardInfo(**shard) for shard in value["shards"]),
                value["complete"],
                value["note"],
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / 'index.json'}: malformed ({error!r}); {PREPARE_AGAIN}") from None

    def check_tokenizer(self, tokenizer: SpanishSPMTokenizer) -> None:
        """Raises DataError unless the shards were made with this tokenizer."""
        if tokenizer.fingerprint != self.tokenizer:
            raise DataError(
                f"{self.folder}: prepared with tokenizer {self.tokenizer[:12]}, given {tokenizer.fingerprint[:12]} "
                f"({tokenizer.vocab_size} ids); use the one in {self.folder / 'tokenizer'} or prepare the data again"
            )

    def duplicates(self, shard: ShardInfo) -> np.ndarray:
        """Numbers of the shard's documents that rows leave out."""
        if not shard.duplicates_elsewhere:
            return np.zeros(0, "<u4")
        return np.fromfile(self.folder / f"{shard.name}.dup", "<u4")

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compares every file with its recorded sha256. Raises DataError naming the first that differs."""
        wanted = None if names is None else set(names)
        for shard in self.shards:
            if wanted is None or shard.name in wanted:
                verify_shard(self.folder, shard)


def verify_shard(folder: Path, shard: ShardInfo) -> None:
    """Raises DataError when a file of the shard is missing or its sha256 differs from the recorded one."""
    for suffix, expected in shard.sha256.items():
        path = folder / f"{shard.name}.{suffix}"
        try:
            found = sha256_file(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None
        if found != expected:
            raise DataError(
                f"{path}: damaged (sha256 {found[:12]}, recorded {expected[:12]}); delete {shard.name}.* and "
                f"{PREPARE_AGAIN}: only this shard is made anew"
            )


def write_index(folder: Path, plan: dict[str, Any], shards: Sequence[ShardInfo], *, complete: bool, note: str) -> None:
    """Writes `index.json` over the finished shards, after every file of theirs is on the disk."""
    sync_folder(folder)
    totals: Counter[str] = Counter()
    bad_files: dict[str, str] = dict(plan["bad_files"])
    for shard in shards:
        totals.update(shard.counts)
        for path, reason in shard.bad_files.items():
            bad_files.setdefault(path, reason)
    write_json(
        folder / "index.json",
        {
            "format": FORMAT,
            "tokenizer": plan["tokenizer"],
            "vocab_size": plan["vocab_size"],
            "sources": plan["sources"],
            "complete": complete,
            "note": note,
            "documents": sum(shard.documents - shard.duplicates_elsewhere for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "text_bytes": sum(shard.text_bytes for shard in shards),
            "counts": dict(sorted(totals.items())),
            "bad_files": bad_files,
            "shards": [shard.to_dict() for shard in shards],
        },
    )
