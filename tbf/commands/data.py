"""`tbf data prepare`, `inspect` and `gc`: token shards from text, a look into them, and the disk space they take."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from tbf.commands import add_verb, add_verbs
from tbf.errors import ConfigError

PREPARE = """\
  tbf data prepare corpus/ --out shards/
  tbf data prepare "corpus/*.parquet" más.jsonl.gz --column content --tokenizer tokenizer/ --out shards/ --processes 8
  tbf data prepare --mix libros/=0.7,leyes/=0.3 --tokenizer tokenizer/ --out shards/ --disk-budget-gb 100
  tbf data prepare hf:erickfmm/red_pajama_es_hq_35 --tokenizer tokenizer/ --out /shared/shards --shard 0/4
"""
INSPECT = """\
  tbf data inspect shards/
  tbf data inspect shards/ --verify --samples 10
  tbf data inspect shards/ --rows 3 --seq-len 256
"""
GC = """\
  tbf data gc
  tbf data gc --cache /mnt/ramdisk --runs /data/runs --days 7
  tbf data gc --yes
"""
MOST_PROCESSES = 8
"""Unless more are asked for: each may take up to 1 GB of memory."""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "data", None, summary="prepare and inspect training data", examples=PREPARE + INSPECT + GC
    )  # fmt: skip
    group = add_verbs(parser)
    _register_prepare(group)
    inspect = add_verb(group, "inspect", run_inspect, summary="show what a folder of shards holds", examples=INSPECT)
    add = inspect.add_argument
    add("folder", type=Path, metavar="DIR", help="made by `tbf data prepare` or by a training run")
    add("--samples", type=int, default=3, metavar="N", help="documents to show the start of (default: %(default)s)")
    add("--rows", type=int, default=0, metavar="N", help="pack rows and show the first N as text")
    add("--seq-len", type=int, default=512, metavar="T", help="tokens a row of --rows (default: %(default)s)")
    add("--verify", action="store_true", help="compare every file with its recorded hash")
    gc = add_verb(
        group, "gc", run_gc, summary="list what could go from the disk, and delete it with --yes", examples=GC,
        about="Finished checkpoints, exports and folders made by `tbf data prepare` are never listed.",
    )  # fmt: skip
    add = gc.add_argument
    add("--cache", type=Path, action="append", metavar="DIR", help="data.cache_dir (default: ~/.cache/tbf); repeatable")
    add("--runs", type=Path, action="append", metavar="DIR", help="folder of run folders (default: runs); repeatable")
    add("--days", type=float, default=30.0, metavar="N", help="shards unused for so long could go (default: 30)")
    add("--yes", action="store_true", help="delete what is listed")


def _register_prepare(group: Any) -> None:
    prepare = add_verb(
        group, "prepare", run_prepare, summary="turn text into token shards", examples=PREPARE,
        about="Stopped or killed, it goes on where it was; train on the folder with --data DIR.",
    )  # fmt: skip
    add = prepare.add_argument
    add(
        "sources", metavar="SOURCE", nargs="*",
        help="file, folder or glob of parquet, jsonl or txt (also .gz, .zst), hf:NAME[:split[:column]], or sample",
    )  # fmt: skip
    add("--mix", metavar="A=0.7,B=0.3", help="instead of SOURCE: sources with their shares of the rows")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    add("--tokenizer", type=Path, metavar="PATH", help="folder or .model file (default: the one in DIR, or train one)")
    add("--vocab-size", type=int, default=50_000, metavar="N", help="of a tokenizer trained here (default: 50,000)")
    add("--column", default="text", metavar="KEY", help="column of parquet, key of jsonl (default: %(default)s)")
    add("--documents", choices=("file", "line", "block"), default="file", help="what a document of a .txt file is")
    add(
        "--processes", type=int, default=min(len(os.sched_getaffinity(0)), MOST_PROCESSES), metavar="N",
        help=f"processes that clean and tokenise (default: cores, at most {MOST_PROCESSES})",
    )  # fmt: skip
    add("--shard", metavar="i/n", default="0/1", help="make only this share, on one of n machines with one DIR")
    add("--min-chars", type=int, default=20, metavar="N", help="drop shorter documents (default: %(default)s)")
    add("--max-chars", type=int, default=100_000, metavar="N", help="cut longer documents; 0: never (default: 100,000)")
    add("--min-spanish", type=float, default=0.65, metavar="X", help="drop less Spanish ones; 0: off (default: 0.65)")
    add("--keep-duplicates", action="store_true", help="keep exact repetitions of a document")
    add("--keep-control", action="store_true", help="keep control characters and line ends as they are")
    add("--no-nfc", action="store_true", help="do not compose accents")
    add("--disk-budget-gb", type=float, default=300.0, metavar="GB", help="stop before tbf holds more (default: 300)")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="counts into the budget (default: runs)")
    add("--strict", action="store_true", help="stop at the first bad file instead of naming and skipping it")
    add("--verify", action="store_true", help="compare every shard with its recorded hash at the end")


def run_prepare(arguments: argparse.Namespace) -> int:
    if arguments.processes < 1:
        raise ConfigError(f"--processes {arguments.processes}: at least 1")
    if bool(arguments.sources) == bool(arguments.mix):
        raise ConfigError("name what to prepare: either SOURCE... or --mix A=0.7,B=0.3")
    from tbf.data.cleaning import CleanOptions
    from tbf.data.inspection import format_prepared
    from tbf.data.plan import PrepareOptions, parse_share, parse_sources
    from tbf.data.prepare import prepare_folder
    from tbf.data.sharding import verify
    from tbf.data.sources import ReadOptions
    from tbf.data.tokenizer import SpanishSPMTokenizer

    options = PrepareOptions(
        read=ReadOptions(column=arguments.column, documents=arguments.documents),
        clean=CleanOptions(
            nfc=not arguments.no_nfc,
            control=not arguments.keep_control,
            min_chars=arguments.min_chars,
            max_chars=arguments.max_chars,
            min_spanish=arguments.min_spanish,
            duplicates=not arguments.keep_duplicates,
        ),
        processes=arguments.processes,
        strict=arguments.strict,
        share=parse_share(arguments.shard),
    )
    result = prepare_folder(
        parse_sources(arguments.mix or arguments.sources),
        arguments.out,
        tokenizer=SpanishSPMTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None,
        vocab_size=arguments.vocab_size,
        options=options,
        disk_budget_gb=arguments.disk_budget_gb,
        count_too=(arguments.runs,),
    )
    print(format_prepared(result))
    if arguments.verify and (arguments.out / "index.json").exists():
        verify(arguments.out, processes=arguments.processes, progress=True)
        print("every file matches its recorded hash")
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    from tbf.data.inspection import format_inspection, format_rows, inspect_folder

    rows = format_rows(arguments.folder, arguments.rows, arguments.seq_len) if arguments.rows > 0 else ""
    print(format_inspection(inspect_folder(arguments.folder, samples=arguments.samples, check=arguments.verify)))
    if arguments.verify:
        print("every file matches its recorded hash")
    if rows:
        print(rows)
    return 0


def run_gc(arguments: argparse.Namespace) -> int:
    from tbf.data.files import free_bytes
    from tbf.data.storage import delete_garbage, find_garbage, format_garbage, human_bytes, used_bytes
    from tbf.system import cache_root

    caches = arguments.cache or [cache_root()]
    runs = arguments.runs or [Path("runs")]
    for folder in [*(arguments.cache or ()), *(arguments.runs or ())]:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name one that holds shards or runs of tbf")
    garbage = find_garbage(caches, runs, unused_days=arguments.days)
    print(format_garbage(garbage, used_bytes([*caches, *runs]), free_bytes(caches[0]), deleting=arguments.yes))
    if arguments.yes and garbage:
        print(f"deleted: {human_bytes(delete_garbage(garbage))} freed")
    return 0
