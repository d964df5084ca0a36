"""Turns sources into token shards: planned once, made in parallel, restartable at any moment.

Which text goes into which shard is decided before any work starts and depends on the sources only. One process makes
one shard from start to end, aside, and renames it when it is whole: a killed run loses at most the shards in the
making, and the files are the same bytes whoever made them, in whatever order.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tbf.data.cleaning import CleanOptions
from tbf.data.duplicates import mark_duplicates
from tbf.data.files import fingerprint, folder_lock, free_bytes, read_json, write_json
from tbf.data.readers import read_part
from tbf.data.shards import (
    FORMAT,
    ShardIndex,
    ShardInfo,
    ShardWriter,
    shard_name,
    verify_shard,
    write_index,
)
from tbf.data.sources import Part, Problems, ReadOptions, Source, list_source
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.data.workers import run_jobs
from tbf.errors import ConfigError, DataError

SHARD_TEXT = (16 << 20, 256 << 20)
"""Least and most bytes of text a shard; in between, a corpus gets about 32 shards."""
KEEP_FREE = 256 << 20
"""Bytes of the disk that preparation never uses."""
REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class PrepareOptions:
    """How a corpus is prepared. Only `read`, `clean` and `shard_bytes` change the shards."""

    read: ReadOptions = field(default_factory=ReadOptions)
    clean: CleanOptions = field(default_factory=CleanOptions)
    shard_bytes: int = 0
    """Text per shard; 0: by the size of the corpus."""
    processes: int = 1
    strict: bool = False
    """Refuse bad files instead of naming and skipping them."""
    validation_share: float = 0.05
    """Recorded for readers that name none; documents are held out when rows are packed."""
    share: tuple[int, int] = (0, 1)
    """(i, n): make the shards whose number is i modulo n; for n machines on one shared folder."""
    disk_budget: int | None = None
    """Bytes that the folder may grow by; None: all but `KEEP_FREE` of what is free."""
    progress: bool = True

    def __post_init__(self) -> None:
        number, count = self.share
        if not 0 <= number < count:
            raise ConfigError(f"shard {number}/{count} does not exist; use 0/{count} to {count - 1}/{count}")


@dataclass(frozen=True)
class PrepareResult:
    """What one call of `prepare` did."""

    folder: Path
    documents: int
    tokens: int
    text_bytes: int
    shards: int
    made: int
    """Shards made by this call; the others were there."""
    counts: dict[str, int]
    bad_files: dict[str, str]
    seconds: float
    complete: bool
    note: str


def parse_sources(text: str) -> list[tuple[str, float | None]]:
    """`SPEC`, or a mixture `SPEC=0.7,SPEC=0.3` of shares of the rows. Raises ConfigError for weights that are none."""
    pieces = text.split(",")
    if len(pieces) == 1 and "=" not in text:
        return [(text, None)]
    if Path(text).exists():
        return [(text, None)]
    parsed = []
    for piece in pieces:
        spec, sign, share = piece.strip().rpartition("=")
        try:
            weight = float(share)
        except ValueError:
            weight = 0.0
        if not sign or not spec or weight <= 0:
            raise ConfigError(f"mixture {text!r}: {piece!r} is not SOURCE=SHARE; write e.g. libros=0.7,leyes=0.3")
        parsed.append((spec, weight))
    if len({spec for spec, _ in parsed}) != len(parsed):
        raise ConfigError(f"mixture {text!r} names a source twice; add its shares up")
    total = sum(weight for _, weight in parsed)
    return [(spec, weight / total) for spec, weight in parsed]


def list_sources(
    sources: Sequence[tuple[str, float | None]], options: PrepareOptions, problems: Problems
) -> tuple[list[Source], int]:
    """Lists every source with parts small enough for the corpus' shards; returns them and the text bytes per shard."""
    least, most = SHARD_TEXT
    wanted = options.shard_bytes or most
    listed = [
        list_source(spec, options.read, part_bytes=min(wanted, 64 << 20), problems=problems) for spec, _ in sources
    ]
    if not options.shard_bytes:
        wanted = min(max(sum(source.text_bytes for source in listed) // 32, least), most)
        if wanted < 64 << 20:
            listed = [list_source(spec, options.read, part_bytes=wanted, problems=problems) for spec, _ in sources]
    return listed, wanted


def make_plan(
    sources: Sequence[tuple[str, float | None]], tokenizer: SpanishSPMTokenizer, options: PrepareOptions
) -> dict[str, Any]:
    """Decides what goes into which shard. The plan is JSON; its `key` names everything that decides a byte."""
    problems = Problems(options.strict)
    listed, wanted = list_sources(sources, options, problems)
    shards: list[dict[str, Any]] = []
    for source in listed:
        waiting: list[Part] = []
        for part in source.parts:
            if waiting and sum(p.text_bytes for p in waiting) + part.text_bytes > wanted:
                shards.append(_planned(len(shards), source, waiting))
                waiting = []
            waiting.append(part)
        shards.append(_planned(len(shards), source, waiting))
    plan = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "clean": asdict(options.clean),
        "content": [source.identity for source in listed],
        "shards": shards,
    }
    plan["key"] = fingerprint(plan, 64)
    plan["sources"] = [{"name": spec, "weight": weight} for spec, weight in sources]
    plan["bad_files"] = problems.files
    plan["validation_share"] = options.validation_share
    return plan


def _planned(number: int, source: Source, parts: list[Part]) -> dict[str, Any]:
    return {"name": shard_name(number), "source": source.spec, "parts": [part.to_dict() for part in parts]}


def prepare(
    sources: str | Sequence[tuple[str, float | None]],
    tokenizer: SpanishSPMTokenizer,
    folder: str | Path,
    options: PrepareOptions = PrepareOptions(),
) -> PrepareResult:
    """Makes the shards of `sources` in `folder`, or those that are missing there.

    Args:
        sources: one spec, a mixture `a=0.7,b=0.3`, or parsed pairs of both.

    Raises:
        DataError: nothing usable in the sources, a bad file with `options.strict`, no room left, or a folder that
            holds another corpus.
    """
    started = time.monotonic()
    folder = Path(folder)
    pairs = parse_sources(sources) if isinstance(sources, str) else list(sources)
    plan = make_plan(pairs, tokenizer, options)
    number, count = options.share
    with folder_lock(folder, "preparing data", name=f"prepare-{number}-{count}", quiet=not options.progress):
        _accept_plan(folder, plan)
        tokenizer.save_pretrained(folder / "tokenizer")
        mine = [shard for i, shard in enumerate(plan["shards"]) if i % count == number]
        for shard in mine:
            for stale in folder.glob(f".{shard['name']}.*.tmp"):
                stale.unlink(missing_ok=True)
        missing = [shard for shard in mine if ShardInfo.read(folder, shard["name"]) is None]
        note = _make_shards(folder, missing, tokenizer, options)
        infos = [ShardInfo.read(folder, shard["name"]) for shard in plan["shards"]]
        finished = [info for info in infos if info is not None]
        made = sum(ShardInfo.read(folder, shard["name"]) is not None for shard in missing)
        complete = len(finished) == len(infos)
        if not complete and not note:
            note = f"{len(infos) - len(finished)} shards are left to the other machines; the last one writes the index"
        elif finished:
            _finish(folder, plan, finished, complete, note)
    counts: Counter[str] = Counter()
    bad_files = dict(plan["bad_files"])
    for info in finished:
        counts.update(info.counts)
        bad_files.update({path: why for path, why in info.bad_files.items() if path not in bad_files})
    result = PrepareResult(
        folder,
        sum(info.documents - info.duplicates_elsewhere for info in finished),
        sum(info.tokens for info in finished),
        sum(info.text_bytes for info in finished),
        len(finished),
        made,
        dict(sorted(counts.items())),
        bad_files,
        time.monotonic() - started,
        complete,
        note,
    )
    if complete and not result.documents:
        raise DataError(f"{', '.join(spec for spec, _ in pairs)}: no document left to train on ({_why(result)})")
    return result


def _why(result: PrepareResult) -> str:
    reasons = [f"{path}: {reason}" for path, reason in list(result.bad_files.items())[:3]]
    reasons += [f"{n} {kind}" for kind, n in result.counts.items()]
    return "; ".join(reasons) or "the source is blank"


def _accept_plan(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / "plan.json"
    if path.exists():
        before = read_json(path, f"delete {folder} and prepare the data again")
        if before.get("key") != plan["key"]:
            raise DataError(
                f"{folder}: holds shards of other sources, another tokenizer or other cleaning options; "
                "name another folder, or delete this one"
            )
    write_json(path, plan)


def _finish(folder: Path, plan: dict[str, Any], infos: list[ShardInfo], complete: bool, note: str) -> None:
    if plan["clean"]["duplicates"]:
        mark_duplicates(folder, infos)
    write_index(folder, plan, infos, complete=complete, note=note)


def _make_shards(
    folder: Path, missing: list[dict[str, Any]], tokenizer: SpanishSPMTokenizer, options: PrepareOptions
) -> str:
    """Makes shards until all are there or the budget is used up; returns why it stopped early, or ''."""
    size_of_token = 2 if tokenizer.vocab_size <= 65_536 else 4
    budget = free_bytes(folder) - KEEP_FREE
    if options.disk_budget is not None:
        budget = min(budget, options.disk_budget)
    state = {"written": 0, "promised": 0, "documents": 0, "tokens": 0}
    note = ""

    def jobs() -> Iterator[dict[str, Any]]:
        nonlocal note
        for shard in missing:
            # At least two bytes of text a token: an upper bound for all but texts of bytes and symbols.
            expected = sum(part["text_bytes"] for part in shard["parts"]) // 2 * size_of_token
            if state["written"] + state["promised"] + expected > budget:
                note = (
                    f"stopped at the disk budget ({budget / 1e9:.2f} GB to write here) before {shard['name']}; "
                    "what is there can be used, and a larger budget goes on from here"
                )
                return
            state["promised"] += expected
            yield shard

    def work(shard: dict[str, Any], report: Callable[[Any], None]) -> ShardInfo:
        writer = ShardWriter(folder, shard["name"], shard["source"], tokenizer, options.clean)
        return _make_shard(writer, shard, options, report)

    total = sum(part["text_bytes"] for shard in missing for part in shard["parts"])
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="preparing",
        disable=not (options.progress and missing),
        file=sys.stderr,
    ) as bar:

        def on_progress(value: tuple[int, int, int]) -> None:
            documents, text_bytes, tokens = value
            state["documents"] += documents
            state["tokens"] += tokens
            rate = state["documents"] / max(bar.format_dict["elapsed"], 1e-3)
            disk = state["tokens"] * size_of_token / 1e9
            bar.set_postfix_str(
                f"{state['documents']:,} docs ({rate:,.0f}/s), {state['tokens'] / 1e6:,.1f} M tokens, {disk:.2f} GB",
                refresh=False,
            )
            bar.update(text_bytes)

        for shard, info in run_jobs(
            jobs(), work, processes=min(options.processes, len(missing)), on_progress=on_progress
        ):
            state["promised"] -= sum(part["text_bytes"] for part in shard["parts"]) // 2 * size_of_token
            state["written"] += info.tokens * size_of_token + 16 * info.documents
    return note


def _make_shard(
    writer: ShardWriter, shard: dict[str, Any], options: PrepareOptions, report: Callable[[Any], None]
) -> ShardInfo:
    problems = Problems(options.strict)
    told = (0, 0, 0)
    last = time.monotonic()
    try:
        for part in shard["parts"]:
            for text in read_part(Part(**part), problems):
                writer.add(text)
                if time.monotonic() - last > REPORT_SECONDS:
                    last = time.monotonic()
                    now = (writer.info.read_documents, writer.info.text_bytes, writer.tokens)
                    report(tuple(a - b for a, b in zip(now, told)))
                    told = now
        info = writer.finish(problems.records, problems.files)
    except BaseException:
        writer.discard()
        raise
    report((info.read_documents - told[0], info.text_bytes - told[1], info.tokens - told[2]))
    return info


def verify(folder: str | Path, *, processes: int = 1, progress: bool = False) -> None:
    """Compares every shard with its recorded hashes. Raises DataError naming the first damaged file."""
    index = ShardIndex.read(folder)

    def work(shard: ShardInfo, report: Callable[[Any], None]) -> None:
        verify_shard(index.folder, shard)

    total = sum(shard.tokens * shard.token_bytes for shard in index.shards)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="verifying",
        disable=not progress or total < 1 << 28,
        file=sys.stderr,
    ) as bar:
        for shard, _ in run_jobs(iter(index.shards), work, processes=processes):
            bar.update(shard.tokens * shard.token_bytes)
