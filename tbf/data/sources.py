"""Finds text: turns `sample`, `hf:NAME[:split[:column]]` and paths into parts that processes read on their own.

A part is a run of row groups, a range of bytes, or one file; their order depends only on names and sizes, so any number
of processes sees the same documents in the same order. Reading is in `tbf.data.readers`.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from tbf.errors import ConfigError, DataError, nearest

DOCUMENT_CHARS = (2_000, 32_000)
"""Least and most characters after which a .txt file starts a new document; small corpora still get many documents."""
SAMPLE_FOLDER = Path(str(resources.files("tbf.data") / "sample_es"))
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
PACKED = {".gz": 4, ".zst": 4}  # suffix -> guess of text bytes per byte on disk
HUB_PART_BYTES = 256 << 20  # guess for a hub file of unknown size


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found inside files."""

    column: str = "text"
    """Parquet column or JSON key that holds the text."""
    documents: str = "file"
    """What a document of a .txt file is: `file`, `line`, or `block` (ended by a blank line)."""

    def __post_init__(self) -> None:
        if self.documents not in ("file", "line", "block"):
            raise ConfigError(
                f"documents={self.documents!r} is unknown; {nearest(self.documents, ['file', 'line', 'block'])}"
            )


@dataclass(frozen=True)
class Part:
    """A piece of a source that one process reads from start to end."""

    kind: str
    """parquet, jsonl, txt, sample or hf."""
    path: str
    start: int = 0
    """First row group (parquet), byte (jsonl, txt) or file (hf)."""
    end: int = -1
    """One past the last; -1: to the end."""
    text_bytes: int = 0
    """Estimated UTF-8 bytes of text."""
    whole: bool = True
    """Is this the only part of its file?"""
    column: str = "text"
    documents: str = "file"
    split: str = ""
    """Of an hf source, as `revision`."""
    revision: str = ""
    document_chars: int = 0
    """txt: a longer file goes on as a new document at the next blank line."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Problems:
    """What could not be read: files by name with a reason, records by kind with a count.

    With `strict`, the first bad file raises DataError instead.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.files: dict[str, str] = {}
        self.records: Counter[str] = Counter()

    def file(self, path: str | Path, reason: str) -> None:
        if self.strict:
            raise DataError(f"{path}: {reason}")
        self.files.setdefault(str(path), reason)

    def record(self, kind: str, count: int = 1) -> None:
        if count:
            self.records[kind] += count


@dataclass(frozen=True)
class Source:
    """A listed source: its parts in reading order and what names its content."""

    spec: str
    parts: tuple[Part, ...]
    identity: Any = field(repr=False)
    """JSON value that changes when the content does (names, sizes and times of files, or the hub's revision)."""

    @property
    def text_bytes(self) -> int:
        return sum(part.text_bytes for part in self.parts)


def list_source(
    spec: str, options: ReadOptions = ReadOptions(), *, part_bytes: int = 64 << 20, problems: Problems | None = None
) -> Source:
    """Lists a source without reading its text.

    Args:
        spec: `sample`, `hf:NAME[:split[:column]]`, or a file, folder or glob of .parquet, .jsonl or .txt
            (the last two also .gz and .zst).
        part_bytes: split large files into parts of about this much text.
        problems: collects unreadable files; None raises on the first.

    Raises:
        DataError: nothing to read.
    """
    problems = problems if problems is not None else Problems(strict=True)
    if spec == "sample":
        return _list_sample()
    if spec.startswith("hf:"):
        from tbf.data.hub import list_hub

        return list_hub(spec, options)
    return list_files(spec, find_files(spec), options, part_bytes=part_bytes, problems=problems)


def open_source(spec: str, options: ReadOptions = ReadOptions(), *, problems: Problems | None = None) -> Iterator[str]:
    """Streams the documents of a source in order, uncleaned. Raises DataError as `list_source` and the readers do."""
    from tbf.data.readers import read_part

    problems = problems if problems is not None else Problems(strict=True)
    for part in list_source(spec, options, problems=problems).parts:
        yield from read_part(part, problems)


def _list_sample() -> Source:
    files = sorted(SAMPLE_FOLDER.glob("*.txt"))
    if not files:
        raise DataError(f"{SAMPLE_FOLDER}: the embedded sample is missing; install tbf again")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    sizes = [file.stat().st_size for file in files]
    chars = _document_chars(sum(sizes))
    parts = tuple(Part("sample", str(file), 0, -1, size, document_chars=chars) for file, size in zip(files, sizes))
    return Source("sample", parts, {"sample": digest})


def _document_chars(total_bytes: int) -> int:
    least, most = DOCUMENT_CHARS
    return min(max(total_bytes // 64, least), most)


def kind_of(path: Path) -> str | None:
    """parquet, jsonl or txt by the file's name; None for anything else."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        kind = KINDS.get(path.with_suffix("").suffix.lower())
        return None if kind == "parquet" else kind
    return KINDS.get(suffix)


def find_files(spec: str) -> list[Path]:
    """Data files of a path, folder (searched deeply) or glob, sorted. Raises DataError when there are none."""
    path = Path(spec).expanduser()
    known = "parquet, jsonl or txt files (jsonl and txt also as .gz or .zst)"
    if path.is_file():
        if kind_of(path) is None:
            raise DataError(f"{path}: unknown kind of file; tbf reads {known}")
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
        inside = [file.relative_to(path).parts for file in found]
        found = [file for file, names in zip(found, inside) if not any(name.startswith(".") for name in names)]
    else:
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (a pattern may be absolute)
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            raise DataError(f"{spec}: no such file or folder; give `sample`, `hf:NAME`, a file, a folder or a glob")
    files = [file for file in found if kind_of(file)]
    if not files:
        others = f"{len(found)} other files" if found else "the folder is empty"
        raise DataError(f"{spec}: no {known} in it ({others}); put some there or name another source")
    return files


def list_files(
    spec: str, files: list[Path], options: ReadOptions, *, part_bytes: int, problems: Problems, identity: Any = None
) -> Source:
    """Lists the parts of local files; see `list_source`."""
    parts: list[Part] = []
    described = []
    chars = _document_chars(sum(file.stat().st_size for file in files if kind_of(file) == "txt"))
    for file in files:
        stat = file.stat()
        described.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
        if stat.st_size == 0:
            problems.file(file, "the file is empty; delete it or copy it again")
        elif kind_of(file) == "parquet":
            parts += _list_parquet(file, options, part_bytes, problems)
        else:
            parts += _list_text(file, stat.st_size, options, part_bytes, chars)
    if not parts:
        reason = next(iter(problems.files.items()), (spec, "nothing to read"))
        raise DataError(f"{spec}: nothing in it can be read ({reason[0]}: {reason[1]})")
    identity = identity or {"files": described}
    return Source(spec, tuple(parts), {**identity, "column": options.column, "documents": options.documents})


def _list_text(file: Path, size: int, options: ReadOptions, part_bytes: int, chars: int) -> list[Part]:
    kind = kind_of(file) or ""
    common: dict[str, Any] = {"column": options.column, "documents": options.documents, "document_chars": chars}
    if file.suffix.lower() in PACKED:  # a compressed stream can only be read from its start
        return [Part(kind, str(file), text_bytes=size * PACKED[file.suffix.lower()], **common)]
    count = max(1, -(-size // part_bytes))
    bounds = [size * i // count for i in range(count + 1)]
    return [
        Part(kind, str(file), start, end, text_bytes=end - start, whole=count == 1, **common)
        for start, end in itertools.pairwise(bounds)
    ]


def _list_parquet(file: Path, options: ReadOptions, part_bytes: int, problems: Problems) -> list[Part]:
    from tbf.data.readers import open_parquet

    table = open_parquet(file, options.column, problems)
    if table is None:
        return []
    metadata = table.metadata
    column = metadata.schema.names.index(options.column) if options.column in metadata.schema.names else None
    if metadata.num_rows == 0:
        problems.file(file, "the file has no rows; delete it or write it again")
        return []
    sizes = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        sizes.append(row_group.total_byte_size if column is None else row_group.column(column).total_uncompressed_size)
    bounds = [0]
    for group in range(1, len(sizes)):
        if sum(sizes[bounds[-1] : group + 1]) > part_bytes:
            bounds.append(group)
    bounds.append(len(sizes))
    whole = len(bounds) == 2
    return [
        Part("parquet", str(file), start, end, sum(sizes[start:end]), whole, options.column, options.documents)
        for start, end in itertools.pairwise(bounds)
    ]
