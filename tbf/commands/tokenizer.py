"""`tbf tokenizer train`: a SentencePiece tokenizer from text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tbf.commands import add_verb, add_verbs
from tbf.errors import ConfigError

EXAMPLES = """\
  tbf tokenizer train corpus/ --out tokenizer/
  tbf tokenizer train "corpus/*.parquet" extra.jsonl --out tokenizer/ --vocab-size 32000 --column content
  tbf tokenizer train sample --out tokenizer/ --vocab-size 4096 --model-type bpe
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "tokenizer", None, summary="train tokenizers", examples=EXAMPLES,
    )  # fmt: skip
    train = add_verb(
        add_verbs(parser), "train", run, summary="train a SentencePiece tokenizer", examples=EXAMPLES,
    )  # fmt: skip
    add = train.add_argument
    add("sources", metavar="SOURCE", nargs="+", help="file, folder or glob of parquet/jsonl/txt, hf:NAME, or sample")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write tokenizer.model into")
    add("--vocab-size", type=int, default=50_000, metavar="N", help="ids, special ones included (default: %(default)s)")
    add("--model-type", choices=("unigram", "bpe"), default="unigram", help="algorithm (default: %(default)s)")
    add("--column", default="text", metavar="KEY", help="column of parquet, key of jsonl (default: %(default)s)")
    add("--sample-gb", type=float, default=1.0, metavar="GB", help="text to learn from, spread over the sources")
    add("--force", action="store_true", help="replace a tokenizer that is there")


def run(arguments: argparse.Namespace) -> int:
    from tbf.data.prepare import sample_texts
    from tbf.data.sharding import PrepareOptions
    from tbf.data.sources import ReadOptions
    from tbf.data.tokenizer import MODEL_FILE, SpanishSPMTokenizer

    if (arguments.out / MODEL_FILE).exists() and not arguments.force:
        raise ConfigError(f"{arguments.out} already holds a tokenizer; pass --force to replace it, or change --out")
    options = PrepareOptions(read=ReadOptions(column=arguments.column))
    sources = [(spec, None) for spec in arguments.sources]
    texts = sample_texts(sources, options, int(arguments.sample_gb * 1e9))
    trained = SpanishSPMTokenizer.train(texts, arguments.vocab_size, arguments.model_type)
    trained.save_pretrained(arguments.out)
    print(f"{arguments.out}: {trained.vocab_size:,} ids, fingerprint {trained.fingerprint[:12]}")
    return 0
