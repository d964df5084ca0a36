"""What the trainer calls on first use: a tokenizer and shards for a data section, from the cache when there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tbf.data.cleaning import CleanOptions
from tbf.data.files import fingerprint, folder_lock
from tbf.data.packing import build_rows
from tbf.data.readers import read_part
from tbf.data.sharding import PrepareOptions, list_sources, make_plan, parse_sources, prepare, verify
from tbf.data.shards import record_validation_share
from tbf.data.sources import Problems
from tbf.data.tokenizer import MODEL_FILE, SpanishSPMTokenizer
from tbf.errors import DataError

TOKENIZER_SAMPLE = 1 << 30
"""Bytes of text that a tokenizer is trained on at first use."""
AS_GIVEN = PrepareOptions(clean=CleanOptions(min_chars=1, min_spanish=0.0))
"""Cleaning of text named to the trainer directly: only what no corpus wants. `tbf data prepare` cleans more."""


class DataSection(Protocol):
    """The fields of the data section that decide rows."""

    source: str
    seq_len: int
    validation_share: float
    num_workers: int
    disk_budget_gb: float


def default_cache() -> Path:
    return Path("~/.cache/tbf").expanduser()


def prepare_data(
    data: DataSection,
    tokenizer: SpanishSPMTokenizer | None,
    cache_dir: str | Path = "",
    *,
    vocab_size: int,
    options: PrepareOptions = AS_GIVEN,
    progress: bool = True,
    check: bool | None = None,
) -> tuple[Path, SpanishSPMTokenizer]:
    """Returns a folder of shards with packed rows for `data`, and the tokenizer that made them.

    Every process of a node may call it: one does the work, the others wait and find everything done. `data.source` may
    also be a folder made by `tbf data prepare`.

    Args:
        tokenizer: None trains one of `vocab_size` ids on the source, or takes the one of a prepared folder.
        cache_dir: where shards and trained tokenizers are kept, under names made from their content.
        progress: show bars, and say when another process is waited for.
        check: compare shards that were there before with their recorded hashes; None: where `progress` is shown, so
            that one process of a run does it.

    Raises:
        DataError: nothing usable in the source, damaged or foreign shards, or no room.
    """
    processes = max(1, data.num_workers)
    check = progress if check is None else check
    if (Path(data.source) / "index.json").is_file():
        folder = Path(data.source)
        tokenizer = tokenizer or SpanishSPMTokenizer.from_pretrained(folder / "tokenizer")
    else:
        cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
        options = replace(options, processes=processes, progress=progress, validation_share=data.validation_share)
        sources = parse_sources(data.source)
        tokenizer = tokenizer or _cached_tokenizer(sources, cache, vocab_size, options)
        plan = make_plan(sources, tokenizer, options)
        folder = cache / "shards" / f"{_slug(data.source)}-{plan['key'][:12]}"
        check = check and (folder / "index.json").is_file()
        budget = int(data.disk_budget_gb * 1e9)
        result = prepare(sources, tokenizer, folder, replace(options, disk_budget=budget))
        for path, reason in result.bad_files.items():
            print(f"skipped {path}: {reason}", file=sys.stderr)
        if not result.complete:
            print(f"{folder}: {result.note}", file=sys.stderr)
    index = record_validation_share(folder, data.validation_share)
    index.check_tokenizer(tokenizer)
    if check:
        verify(folder, processes=processes, progress=progress)
    build_rows(index, data.seq_len, data.validation_share, processes=processes)
    return folder, tokenizer


def _slug(source: str) -> str:
    return re.sub(r"[^\w]+", "-", source).strip("-")[-40:].lower() or "data"


def _cached_tokenizer(
    sources: Sequence[tuple[str, float | None]], cache: Path, vocab_size: int, options: PrepareOptions
) -> SpanishSPMTokenizer:
    content = [source.identity for source in list_sources(sources, options, Problems(options.strict))[0]]
    folder = cache / "tokenizers" / f"{_slug(sources[0][0])}-{fingerprint([content, vocab_size, TOKENIZER_SAMPLE])}"
    with folder_lock(folder, "training a tokenizer", quiet=not options.progress):
        if (folder / MODEL_FILE).exists():
            return SpanishSPMTokenizer.from_pretrained(folder)
        texts = sample_texts(sources, options, TOKENIZER_SAMPLE)
        tokenizer = SpanishSPMTokenizer.train(texts, vocab_size)
        tokenizer.save_pretrained(folder)
        return tokenizer


def sample_texts(
    sources: Sequence[tuple[str, float | None]], options: PrepareOptions, sample_bytes: int
) -> Iterator[str]:
    """Streams about `sample_bytes` of text spread over the sources' parts. Raises DataError when there is none."""
    problems = Problems(options.strict)
    listed, _ = list_sources(sources, options, problems)
    parts = [part for source in listed for part in source.parts]
    step = max(1, sum(part.text_bytes for part in parts) // sample_bytes)
    taken = 0
    for part in parts[::step]:
        for text in read_part(part, problems):
            taken += len(text.encode("utf-8", "ignore"))
            yield text
            if taken >= sample_bytes:
                return
    if not taken:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(problems.files.items())[:3])
        raise DataError(f"{sources[0][0]}: no text in it ({reasons or 'the source is blank'})")
