"""Decides which text goes into which shard, before any work starts and from the sources alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tbf.data.cleaning import CleanOptions
from tbf.data.files import fingerprint, read_json, write_json
from tbf.data.shards import FORMAT, shard_name
from tbf.data.sources import Part, Problems, ReadOptions, Source, list_source
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError

SHARD_TEXT = (16 << 20, 256 << 20)
"""Least and most bytes of text a shard; in between, a corpus gets about 32 shards."""


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
    share: tuple[int, int] = (0, 1)
    """(i, n): make the shards whose number is i modulo n; for n machines on one shared folder."""
    disk_budget: int | None = None
    """Bytes that the folder may grow by; None: no limit of its own. `KEEP_FREE` of the disk always stays free."""
    progress: bool = True

    def __post_init__(self) -> None:
        number, count = self.share
        if not 0 <= number < count:
            raise ConfigError(f"shard {number}/{count} does not exist; use 0/{count} to {count - 1}/{count}")


def parse_sources(given: str | Sequence[str]) -> list[tuple[str, float | None]]:
    """(spec, share of the rows) of every source.

    Args:
        given: specs, which share the rows by their sizes; or one text: `SPEC`, or a mixture `SPEC=0.7,SPEC=0.3`.

    Raises:
        ConfigError: weights that are none, or a source named twice.
    """
    if not isinstance(given, str):
        return _different([(spec, None) for spec in given]) if len(given) > 1 else parse_sources(given[0])
    pieces = given.split(",")
    if (len(pieces) == 1 and "=" not in given) or Path(given).exists():
        return [(given, None)]
    parsed: list[tuple[str, float | None]] = []
    for piece in pieces:
        spec, sign, share = piece.strip().rpartition("=")
        try:
            weight = float(share)
        except ValueError:
            weight = 0.0
        if not sign or not spec or not 0 < weight < math.inf:
            raise ConfigError(f"mixture {given!r}: {piece!r} is not SOURCE=SHARE; write e.g. libros=0.7,leyes=0.3")
        parsed.append((spec, weight))
    total = sum(weight or 0.0 for _, weight in parsed)
    return _different([(spec, (weight or 0.0) / total) for spec, weight in parsed])


def _different(sources: list[tuple[str, float | None]]) -> list[tuple[str, float | None]]:
    specs = [spec for spec, _ in sources]
    if again := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise ConfigError(f"the source {again!r} is named twice; name it once, with its whole share of a mixture")
    return sources


def parse_share(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`, as `--shard` takes it. Raises ConfigError for anything else."""
    number, slash, count = text.partition("/")
    if not slash or not number.isdigit() or not count.isdigit() or int(number) >= int(count):
        raise ConfigError(f"--shard {text!r} is not i/n with 0 <= i < n; write e.g. 0/4 on the first of 4 machines")
    return int(number), int(count)


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
            listed = [
                source  # parts of the hub have the size they have
                if source.spec.startswith("hf:")
                else list_source(source.spec, options.read, part_bytes=wanted, problems=problems)
                for source in listed
            ]
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
    return plan


def _planned(number: int, source: Source, parts: list[Part]) -> dict[str, Any]:
    return {"name": shard_name(number), "source": source.spec, "parts": [part.to_dict() for part in parts]}


def accept_plan(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / "plan.json"
    if path.exists():
        before = read_json(path, f"delete {folder} and prepare the data again")
        if before.get("key") != plan["key"]:
            raise DataError(
                f"{folder}: holds shards of other sources, another tokenizer or other cleaning options; "
                "name another folder, or delete this one"
            )
        if before == plan:
            path.touch()  # tells when the shards were used last
            return
    write_json(path, plan)
