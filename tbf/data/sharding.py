"""Turns sources into token shards: planned once, made in parallel, restartable at any moment.

Which text goes into which shard is decided before any work starts and depends on the sources only. One process makes
one shard from start to end, aside, and renames it when it is whole: a killed run loses at most the shards in the
making, and the files are the same bytes whoever made them, in whatever order.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tbf.data.duplicates import mark_duplicates
from tbf.data.files import folder_lock, free_bytes, sweep
from tbf.data.plan import PrepareOptions, accept_plan, make_plan, parse_sources
from tbf.data.readers import read_part
from tbf.data.shard_writer import ShardWriter
from tbf.data.shards import ShardIndex, ShardInfo, verify_shard, write_index
from tbf.data.sources import Part, Problems
from tbf.data.storage import KEEP_FREE
from tbf.data.tokenizer import MODEL_FILE, SpanishSPMTokenizer
from tbf.data.workers import run_jobs
from tbf.errors import DataError

DEFAULTS = PrepareOptions()
REPORT_SECONDS = 0.5


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
    made_bytes: int
    """Text in them."""
    counts: dict[str, int]
    bad_files: dict[str, str]
    seconds: float
    complete: bool
    note: str


def prepare(
    sources: str | Sequence[tuple[str, float | None]],
    tokenizer: SpanishSPMTokenizer,
    folder: str | Path,
    options: PrepareOptions = DEFAULTS,
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
        if count == 1:  # else other machines may be writing theirs
            sweep(folder)
            sweep(folder / "tokenizer")
        accept_plan(folder, plan)
        if not _holds(folder / "tokenizer", tokenizer):
            tokenizer.save_pretrained(folder / "tokenizer")
        mine = [shard for i, shard in enumerate(plan["shards"]) if i % count == number]
        _sweep(folder, mine)
        missing = [shard for shard in mine if ShardInfo.read(folder, shard["name"]) is None]
        try:
            note = stopped = _make_shards(folder, missing, tokenizer, options)
        finally:
            _sweep(folder, missing)
        infos = [ShardInfo.read(folder, shard["name"]) for shard in plan["shards"]]
        finished = [info for info in infos if info is not None]
        names = {shard["name"] for shard in missing}
        made = [info for info in finished if info.name in names]
        complete = len(finished) == len(infos)
        if complete and not any(info.documents for info in finished):
            _clear(folder, plan)
        elif not complete and not note:
            note = f"{len(infos) - len(finished)} shards are left to the other machines; the last one writes the index"
        elif finished:
            _finish(folder, plan, finished, complete, note, changed=bool(made))
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
        len(made),
        sum(info.text_bytes for info in made),
        dict(sorted(counts.items())),
        bad_files,
        time.monotonic() - started,
        complete,
        note,
    )
    if not result.documents and (complete or stopped):
        why = stopped or _why(result)
        raise DataError(f"{', '.join(spec for spec, _ in pairs)}: no document left to train on ({why})")
    return result


def _why(result: PrepareResult) -> str:
    reasons = [f"{path}: {reason}" for path, reason in list(result.bad_files.items())[:3]]
    reasons += [f"{n} {kind}" for kind, n in result.counts.items()]
    return "; ".join(reasons) or "the source is blank"


def _sweep(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Removes what killed workers left of these shards; other machines may be making the others."""
    names = {shard["name"] for shard in shards}
    for stale in folder.glob(".shard-*.tmp"):
        if stale.name.split(".")[1] in names:
            stale.unlink(missing_ok=True)


def _clear(folder: Path, plan: dict[str, Any]) -> None:
    """Takes shards without any document out of the way of the next try, with better text."""
    for shard in plan["shards"]:
        for file in folder.glob(f"{shard['name']}.*"):
            file.unlink(missing_ok=True)
    for name in ("index.json", "plan.json"):
        (folder / name).unlink(missing_ok=True)


def _holds(folder: Path, tokenizer: SpanishSPMTokenizer) -> bool:
    file = folder / MODEL_FILE
    return file.exists() and file.read_bytes() == tokenizer.model


def _finish(
    folder: Path, plan: dict[str, Any], infos: list[ShardInfo], complete: bool, note: str, *, changed: bool
) -> None:
    """Looks for duplicates when there are new shards, and writes the index when it says anything new."""
    before = None
    if not changed:
        with contextlib.suppress(DataError):
            before = ShardIndex.read(folder)
    if plan["clean"]["duplicates"] and (before is None or len(before.shards) != len(infos)):
        mark_duplicates(folder, infos)
    if before is None or (before.sources, before.shards, before.complete, before.note) != (
        tuple(plan["sources"]), tuple(infos), complete, note
    ):  # fmt: skip
        write_index(folder, plan, infos, complete=complete, note=note)


def _make_shards(
    folder: Path, missing: list[dict[str, Any]], tokenizer: SpanishSPMTokenizer, options: PrepareOptions
) -> str:
    """Makes shards until all are there or the budget is used up; returns why it stopped early, or ''."""
    import pyarrow.compute  # noqa: F401 (once here, before the processes fork, instead of once in each)

    size_of_token = 2 if tokenizer.vocab_size <= 65_536 else 4
    budget = max(0, free_bytes(folder) - KEEP_FREE)
    reason = f"the disk has {budget / 1e9:.2f} GB free, besides {KEEP_FREE / 1e9:.2f} GB that are left alone"
    if options.disk_budget is not None and options.disk_budget < budget:
        budget = options.disk_budget
        reason = f"the disk budget leaves {budget / 1e9:.2f} GB"
    state = {"written": 0, "promised": 0, "documents": 0, "tokens": 0}
    note = ""

    def jobs() -> Iterator[dict[str, Any]]:
        nonlocal note
        for shard in missing:
            # At least two bytes of text a token: an upper bound for all but texts of bytes and symbols.
            expected = sum(part["text_bytes"] for part in shard["parts"]) // 2 * size_of_token
            if state["written"] + state["promised"] + expected > budget:
                note = (
                    f"stopped before {shard['name']}: {reason}; what is there can be used, and with more room the same "
                    "command goes on from here"
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
        if not note:
            bar.update(bar.total - bar.n)  # sizes were estimates, and cleaning drops text
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
