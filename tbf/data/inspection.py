"""Shows what is in a prepared folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tbf.data.files import read_json
from tbf.data.packing import SPLITS
from tbf.data.sharding import PrepareResult, verify
from tbf.data.shards import PREPARE_AGAIN, FlatFile, ShardIndex, read_documents
from tbf.data.storage import folder_bytes, human_bytes
from tbf.data.tokenizer import SpanishSPMTokenizer

_SAMPLE_TOKENS = 60
_BAR = 40


@dataclass(frozen=True)
class Inspection:
    """What `tbf data inspect` shows."""

    folder: Path
    documents: int
    tokens: int
    text_bytes: int
    disk_bytes: int
    shards: int
    complete: bool
    note: str
    sources: dict[str, tuple[int, int]]
    """Per source: documents, tokens."""
    weights: dict[str, float]
    """Per source of a mixture: its share of the rows."""
    counts: dict[str, int]
    bad_files: dict[str, str]
    duplicates: int
    unknown_rate: float
    bytes_per_token: float
    lengths: dict[int, int]
    """Documents per length in tokens: from this power of two up to the next."""
    rows: dict[str, dict[str, float]]
    """Per packing: rows and efficiency of each split."""
    samples: list[str]


def inspect_folder(folder: str | Path, *, samples: int = 3, check: bool = False) -> Inspection:
    """Describes a prepared folder.

    Args:
        samples: documents to decode, spread over the corpus.
        check: compare every file with its recorded hash first.

    Raises:
        DataError: nothing prepared there, or (with `check`) a damaged file.
    """
    folder = Path(folder)
    index = ShardIndex.read(folder)
    if check:
        verify(folder)
    tokenizer = SpanishSPMTokenizer.from_pretrained(folder / "tokenizer")
    stored = read_json(folder / "index.json", PREPARE_AGAIN)
    lengths: dict[int, int] = {}
    sources: dict[str, tuple[int, int]] = {}
    for shard in index.shards:
        offsets, _ = read_documents(folder, shard)
        powers = np.floor(np.log2(np.diff(offsets.astype(np.int64)))).astype(int)
        for power, count in zip(*np.unique(powers, return_counts=True)):
            lengths[2 ** int(power)] = lengths.get(2 ** int(power), 0) + int(count)
        before = sources.get(shard.source, (0, 0))
        sources[shard.source] = (before[0] + shard.documents - shard.duplicates_elsewhere, before[1] + shard.tokens)
    elsewhere = sum(shard.duplicates_elsewhere for shard in index.shards)
    stored_documents = sum(shard.documents for shard in index.shards)
    content = index.tokens - 2 * stored_documents
    return Inspection(
        folder,
        index.documents,
        index.tokens,
        stored["text_bytes"],
        folder_bytes(folder),
        len(index.shards),
        index.complete,
        index.note,
        sources,
        {source["name"]: source["weight"] for source in index.sources if source["weight"] is not None},
        stored["counts"],
        stored["bad_files"],
        elsewhere + stored["counts"].get("duplicate", 0),
        sum(shard.unknown_tokens for shard in index.shards) / max(1, content),
        stored["text_bytes"] / max(1, content),
        dict(sorted(lengths.items())),
        _packings(folder),
        _samples(index, tokenizer, samples),
    )


def _packings(folder: Path) -> dict[str, dict[str, float]]:
    found = {}
    for path in sorted(folder.glob("rows/*/rows.json")):
        tables = read_json(path, "delete the folder rows: it is made anew")["tables"]
        width = int(path.parent.name.split("-")[0][1:])
        values: dict[str, float] = {}
        for split in SPLITS:
            rows = sum(table["rows"] for table in tables[split])
            values[f"{split}_rows"] = rows
            values[f"{split}_efficiency"] = sum(t["tokens"] for t in tables[split]) / max(1, rows * width)
        found[path.parent.name] = values
    return found


def _samples(index: ShardIndex, tokenizer: SpanishSPMTokenizer, count: int) -> list[str]:
    filled = [shard for shard in index.shards if shard.documents]
    found = []
    for shard in filled[:: max(1, len(filled) // max(1, count))][:count]:
        offsets, _ = read_documents(index.folder, shard)
        document = shard.documents // 2
        start, end = int(offsets[document]), int(offsets[document + 1])
        file = FlatFile(index.folder / f"{shard.name}.bin", index.dtype)
        found.append(str(tokenizer.decode(file.read(start, min(end - start, _SAMPLE_TOKENS)))))
        file.close()
    return found


def format_inspection(found: Inspection) -> str:
    """The description for people."""
    lines = [
        f"{found.folder}: {found.documents:,} documents, {found.tokens:,} tokens in {found.shards} shards, "
        f"{human_bytes(found.disk_bytes)} on disk",
        f"text {human_bytes(found.text_bytes)}; {found.bytes_per_token:.3f} bytes a token; "
        f"unknown {found.unknown_rate:.4%}; duplicates left out {found.duplicates:,}",
    ]
    if not found.complete:
        lines.append(f"not complete: {found.note}")
    if len(found.sources) > 1:
        lines += [
            f"  {name}: {documents:,} documents, {tokens:,} tokens"
            + (f", {found.weights[name]:.1%} of the rows" if name in found.weights else "")
            for name, (documents, tokens) in found.sources.items()
        ]
    lines += ["", *_format_counts(found.counts, found.bad_files), "documents by length in tokens:"]
    largest = max(found.lengths.values(), default=1)
    for low, count in found.lengths.items():
        lines.append(f"{low:>9,} - {2 * low - 1:<9,} {count:>9,} {'#' * round(_BAR * count / largest)}")
    for name, values in found.rows.items():
        lines.append(
            f"rows {name}: {values['train_rows']:,} to train ({values['train_efficiency']:.2%} filled), "
            f"{values['validation_rows']:,} to validate"
        )
    lines += ["", *(f"> {sample} ..." for sample in found.samples)]
    return "\n".join(lines)


def format_rows(folder: str | Path, count: int, seq_len: int) -> str:
    """Packs the corpus for rows of `seq_len` tokens and shows the first `count` rows of training as text."""
    from tbf.data.dataset import PackedDataset

    folder = Path(folder)
    tokenizer = SpanishSPMTokenizer.from_pretrained(folder / "tokenizer")
    dataset = PackedDataset(folder, seq_len=seq_len, tokenizer=tokenizer)
    lines = []
    for position in range(min(count, len(dataset))):
        row = dataset.row(position)
        lines.append(f"row {position}:")
        for document in range(1, int(row["segment_ids"].max()) + 1):
            lines.append(f"  [{document}] {tokenizer.decode(row['input_ids'][row['segment_ids'] == document])}")
    return "\n".join(lines)


def format_prepared(result: PrepareResult) -> str:
    """The summary of a preparation for people."""
    speed = result.made_bytes / 1e6 / max(result.seconds, 1e-9)
    state = "complete" if result.complete else f"not complete: {result.note}"
    lines = [
        f"{result.folder}: {result.documents:,} documents, {result.tokens:,} tokens in {result.shards} shards "
        f"({result.made} made now in {result.seconds:.1f} s, {speed:.1f} MB/s); {state}",
        *_format_counts(result.counts, result.bad_files),
    ]
    return "\n".join(lines)


def _format_counts(counts: dict[str, int], bad_files: dict[str, str]) -> list[str]:
    lines = []
    if counts:
        lines.append("cleaning: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    lines += [f"bad file {path}: {reason}" for path, reason in bad_files.items()]
    return lines
