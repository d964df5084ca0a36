"""`tbf data prepare` and `tbf data inspect`: token shards from text, and a look into them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tbf.commands import add_verb, add_verbs
from tbf.errors import ConfigError

PREPARE = """\
  tbf data prepare corpus/ --tokenizer tokenizer/ --out shards/
  tbf data prepare "corpus/*.parquet" --column content --tokenizer tokenizer/ --out shards/ --processes 8
  tbf data prepare "libros=0.7,leyes=0.3" --tokenizer tokenizer/ --out shards/ --disk-budget-gb 100
"""
INSPECT = """\
  tbf data inspect shards/
  tbf data inspect shards/ --rows 3 --seq-len 256
"""


def register(verbs: Any) -> None:
    parser = add_verb(verbs, "data", None, summary="prepare and inspect training data", examples=PREPARE + INSPECT)
    group = add_verbs(parser)
    _register_prepare(group)
    inspect = add_verb(group, "inspect", run_inspect, summary="show what a folder of shards holds", examples=INSPECT)
    inspect.add_argument("folder", type=Path, metavar="DIR", help="made by `tbf data prepare` or by a training run")
    inspect.add_argument("--rows", type=int, default=0, metavar="N", help="also show the first N rows as text")
    inspect.add_argument("--seq-len", type=int, default=512, metavar="T", help="tokens a row (default: %(default)s)")
    inspect.add_argument("--verify", action="store_true", help="compare every file with its recorded hash")


def _register_prepare(group: Any) -> None:
    prepare = add_verb(
        group, "prepare", run_prepare, summary="turn text into token shards", examples=PREPARE,
        about="Stopped or killed, it goes on where it was; train on the folder with --data DIR.",
    )  # fmt: skip
    add = prepare.add_argument
    add("source", metavar="SOURCE", help="file, folder or glob of parquet/jsonl/txt, hf:NAME, sample, or a mixture")
    add("--tokenizer", type=Path, required=True, metavar="PATH", help="folder or .model file")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    add("--column", default="text", metavar="KEY", help="column of parquet, key of jsonl (default: %(default)s)")
    add("--documents", choices=("file", "line", "block"), default="file", help="what a document of a .txt file is")
    add("--processes", type=int, default=1, metavar="N", help="processes that clean and tokenise (default: 1)")
    add("--min-chars", type=int, default=20, metavar="N", help="drop shorter documents (default: %(default)s)")
    add("--min-spanish", type=float, default=0.65, metavar="X", help="drop less Spanish ones; 0: off (default: 0.65)")
    add("--keep-duplicates", action="store_true", help="keep exact repetitions of a document")
    add("--validation-share", type=float, default=0.05, metavar="X", help="documents held out (default: %(default)s)")
    add("--disk-budget-gb", type=float, default=300.0, metavar="GB", help="stop before using more (default: 300)")
    add("--strict", action="store_true", help="stop at the first bad file instead of naming and skipping it")


def run_prepare(arguments: argparse.Namespace) -> int:
    if arguments.processes < 1:
        raise ConfigError(f"--processes {arguments.processes}: at least 1")
    from tbf.data.cleaning import CleanOptions
    from tbf.data.sharding import PrepareOptions, prepare
    from tbf.data.sources import ReadOptions
    from tbf.data.tokenizer import SpanishSPMTokenizer

    options = PrepareOptions(
        read=ReadOptions(column=arguments.column, documents=arguments.documents),
        clean=CleanOptions(
            min_chars=arguments.min_chars,
            min_spanish=arguments.min_spanish,
            duplicates=not arguments.keep_duplicates,
        ),
        processes=arguments.processes,
        strict=arguments.strict,
        validation_share=arguments.validation_share,
        disk_budget=int(arguments.disk_budget_gb * 1e9),
    )
    tokenizer = SpanishSPMTokenizer.from_pretrained(arguments.tokenizer)
    result = prepare(arguments.source, tokenizer, arguments.out, options)
    for path, reason in result.bad_files.items():
        print(f"skipped {path}: {reason}")
    if result.counts:
        print("cleaning: " + ", ".join(f"{count:,} {kind}" for kind, count in result.counts.items()))
    print(f"{result.folder}: {result.documents:,} documents, {result.tokens:,} tokens in {result.shards} shard(s), "
          f"{result.made} made now in {result.seconds:.1f} s")  # fmt: skip
    if not result.complete:
        print(f"incomplete: {result.note}")
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    from tbf.data.sharding import verify
    from tbf.data.shards import ShardIndex

    index = ShardIndex.read(arguments.folder)
    state = "complete" if index.complete else f"incomplete: {index.note}"
    print(f"{index.folder}: {state}")
    print(f"  {index.documents:,} documents, {index.tokens:,} tokens, {len(index.shards)} shard(s), {index.dtype} ids")
    print(f"  tokenizer {index.tokenizer[:12]} with {index.vocab_size:,} ids, in {index.folder / 'tokenizer'}")
    for source in index.sources:
        shards = [shard for shard in index.shards if shard.source == source["name"]]
        share = "" if source["weight"] is None else f", {source['weight']:.0%} of the rows"
        print(f"  source {source['name']}: {sum(shard.tokens for shard in shards):,} tokens{share}")
    if arguments.verify:
        verify(arguments.folder, progress=True)
        print("  every file matches its recorded hash")
    if arguments.rows > 0:
        _show_rows(index.folder, arguments.rows, arguments.seq_len)
    return 0


def _show_rows(folder: Path, count: int, seq_len: int) -> None:
    from tbf.data.loader import PackedDataset
    from tbf.data.tokenizer import SpanishSPMTokenizer

    tokenizer = SpanishSPMTokenizer.from_pretrained(folder / "tokenizer")
    dataset = PackedDataset(folder, seq_len=seq_len, tokenizer=tokenizer)
    print(f"  {len(dataset):,} rows of {seq_len} tokens, {dataset.packing_efficiency:.1%} filled")
    for position in range(min(count, len(dataset))):
        row = dataset.row(position)
        print(f"row {position}:")
        for document in range(1, int(row["segment_ids"].max()) + 1):
            text = tokenizer.decode(row["input_ids"][row["segment_ids"] == document])
            print(f"  [{document}] {text}")
