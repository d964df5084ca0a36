"""What the trainer calls on first use: a tokenizer and shards for a data section, from the cache when there."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tbf.data.cleaning import CleanOptions
from tbf.data.files import fingerprint, folder_lock, sweep
from tbf.data.packing import build_rows
from tbf.data.plan import PrepareOptions, list_sources, make_plan, parse_sources
from tbf.data.ramdisk import is_ram_disk, record_ram_dir, recorded_copy
from tbf.data.sharding import DEFAULTS, PrepareResult, prepare, verify
from tbf.data.shards import ShardIndex
from tbf.data.sources import Problems, ReadOptions
from tbf.data.storage import budget_left
from tbf.data.tokenizer import MODEL_FILE, SpanishSPMTokenizer
from tbf.data.tokenizer_tools import SAMPLE_GB, train_tokenizer
from tbf.system import cache_root


class DataSection(Protocol):
    """The fields of the data section that decide rows; see `tbf.config.DataConfig`."""

    source: str
    column: str
    documents: str
    min_chars: int
    min_spanish: float
    seq_len: int
    validation_share: float
    num_workers: int
    disk_budget_gb: float


def prepare_data(
    data: DataSection,
    tokenizer: SpanishSPMTokenizer | None,
    cache_dir: str | Path = "",
    *,
    vocab_size: int,
    progress: bool = True,
    check: bool | None = None,
    count_too: Sequence[Path] = (Path("runs"),),
) -> tuple[Path, SpanishSPMTokenizer]:
    """Returns a folder of shards with packed rows for `data`, and the tokenizer that made them.

    Every process of a node may call it: one does the work, the others wait and find everything done. `data.source` may
    also be a folder made by `tbf data prepare`.

    Args:
        tokenizer: None trains one of `vocab_size` ids on the source, or takes the one of a prepared folder.
        cache_dir: where shards and trained tokenizers are kept, under names made from their content; '' is
            ~/.cache/tbf. On a RAM disk only copies are kept, made in the background as far as there is room.
        progress: show bars, and say when another process is waited for.
        check: compare shards that were there before with their recorded hashes; None: where `progress` is shown, so
            that one process of a run does it.
        count_too: folders that share the disk budget with the cache: runs with their checkpoints and exports.

    Raises:
        DataError: nothing usable in the source, damaged or foreign shards, or no room.
    """
    processes = max(1, data.num_workers)
    ram_dir: Path | None = None
    check = progress if check is None else check
    if (Path(data.source) / "index.json").is_file():
        folder = Path(data.source)
        tokenizer = tokenizer or SpanishSPMTokenizer.from_pretrained(folder / "tokenizer")
    else:
        cache = Path(cache_dir).expanduser() if cache_dir else cache_root()
        if is_ram_disk(cache) and (on_disk := cache_root()).absolute() != cache.absolute():
            ram_dir, cache = cache, on_disk
        options = PrepareOptions(
            read=ReadOptions(column=data.column, documents=data.documents),
            clean=CleanOptions(min_chars=data.min_chars, min_spanish=data.min_spanish),
            processes=processes,
            progress=progress,
        )
        sources = parse_sources(data.source)
        tokenizer = tokenizer or _cached_tokenizer(sources, cache, vocab_size, options)
        plan = make_plan(sources, tokenizer, options)
        folder = cache / "shards" / f"{_slug(data.source)}-{plan['key'][:12]}"
        check = check and (folder / "index.json").is_file()
        budget = budget_left(data.disk_budget_gb, [cache, *count_too])
        result = prepare(sources, tokenizer, folder, replace(options, disk_budget=budget))
        for path, reason in result.bad_files.items():
            print(f"skipped {path}: {reason}", file=sys.stderr)
        if not result.complete:
            print(f"{folder}: {result.note}", file=sys.stderr)
    index = ShardIndex.read(folder)
    index.check_tokenizer(tokenizer)
    if check:
        verify(folder, processes=processes, progress=progress)
    build_rows(index, data.seq_len, data.validation_share, processes=processes)
    record_ram_dir(folder, ram_dir)
    if progress and (copy := recorded_copy(folder, index.key)):
        copy.start()
    return folder, tokenizer


def _slug(source: str) -> str:
    return re.sub(r"[^\w]+", "-", source).strip("-")[-40:].lower() or "data"


def _cached_tokenizer(
    sources: Sequence[tuple[str, float | None]], cache: Path, vocab_size: int, options: PrepareOptions
) -> SpanishSPMTokenizer:
    content = [source.identity for source in list_sources(sources, options, Problems(options.strict))[0]]
    folder = cache / "tokenizers" / f"{_slug(sources[0][0])}-{fingerprint([content, vocab_size, SAMPLE_GB])}"
    return _tokenizer_in(folder, sources, vocab_size, options)


def _tokenizer_in(
    folder: Path, sources: Sequence[tuple[str, float | None]], vocab_size: int, options: PrepareOptions
) -> SpanishSPMTokenizer:
    """The tokenizer of a folder, trained there if it is missing."""
    with folder_lock(folder, "training a tokenizer", quiet=not options.progress):
        sweep(folder)
        if not (folder / MODEL_FILE).exists():
            train_tokenizer(sources, folder, vocab_size=vocab_size, options=options)
        return SpanishSPMTokenizer.from_pretrained(folder)


def prepare_folder(
    sources: str | Sequence[tuple[str, float | None]],
    out: str | Path,
    *,
    tokenizer: SpanishSPMTokenizer | None = None,
    vocab_size: int = 50_000,
    options: PrepareOptions = DEFAULTS,
    disk_budget_gb: float = 300.0,
    count_too: Sequence[Path] = (Path("runs"),),
) -> PrepareResult:
    """What `tbf data prepare` does: shards of `sources` in `out`, which then is a source for the trainer.

    Args:
        sources: a spec, a mixture `a=0.7,b=0.3`, or (spec, weight) pairs of several sources.
        tokenizer: None takes the one in `out`, or trains one of `vocab_size` ids on a sample of the sources.

    Raises:
        DataError, ConfigError: as `tbf.data.sharding.prepare`.
    """
    out = Path(out)
    pairs = parse_sources(sources) if isinstance(sources, str) else list(sources)
    tokenizer = tokenizer or _tokenizer_in(out / "tokenizer", pairs, vocab_size, options)
    budget = budget_left(disk_budget_gb, [out, cache_root(), *count_too])
    return prepare(pairs, tokenizer, out, replace(options, disk_budget=budget))
