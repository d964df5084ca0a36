"""`tbf tokenizer train` and `eval`: SentencePiece tokenizers from text, and how well they fit a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbf.commands import add_verb, add_verbs
from tbf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tbf.data.sources import Problems

TRAIN = """\
  tbf tokenizer train corpus/ --out tokenizer/
  tbf tokenizer train "corpus/*.parquet" extra.jsonl --out tokenizer/ --vocab-size 32000 --column content
  tbf tokenizer train hf:erickfmm/red_pajama_es_hq_35 --out tokenizer/ --sample-gb 2
  tbf tokenizer train sample --out tokenizer/ --vocab-size 4096 --model-type bpe
"""
EVAL = """\
  tbf tokenizer eval tokenizer/ --data held-out.parquet
  tbf tokenizer eval tokenizer-16k/ tokenizer-50k/ other.model tokenizer.json --data held-out.parquet
  tbf tokenizer eval tokenizer/ --text "El ñandú cuesta 3.141,59 €."
"""


def register(verbs: Any) -> None:
    parser = add_verb(verbs, "tokenizer", None, summary="train and compare tokenizers", examples=TRAIN + EVAL)
    group = add_verbs(parser)
    train = add_verb(
        group, "train", run_train, summary="train a SentencePiece tokenizer", examples=TRAIN,
        about="The same text gives the same tokenizer, in bounded memory.",
    )  # fmt: skip
    add = train.add_argument
    add("sources", metavar="SOURCE", nargs="+", help="file, folder or glob of parquet/jsonl/txt, hf:NAME, or sample")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write tokenizer.model into")
    add("--vocab-size", type=int, default=50_000, metavar="N", help="ids, special ones included (default: %(default)s)")
    add("--model-type", choices=("unigram", "bpe"), default="unigram", help="algorithm (default: %(default)s)")
    add("--column", default="text", metavar="KEY", help="column of parquet, key of jsonl (default: %(default)s)")
    add(
        "--sample-gb", type=float, default=1.0, metavar="GB",
        help="text to learn from, spread over the sources (default: %(default)s)",
    )  # fmt: skip
    add("--strict", action="store_true", help="stop at the first bad file instead of skipping it")
    add("--force", action="store_true", help="replace a tokenizer that is there")
    evaluate = add_verb(
        group, "eval", run_eval, summary="compare tokenizers on a text", examples=EVAL,
        about="Shows tokens per word, bytes per token, the shares of unknown and of single-byte tokens, and whether "
        "numbers, accents, emoji and URLs come back exactly.",
    )  # fmt: skip
    add = evaluate.add_argument
    add("tokenizers", metavar="FILE", nargs="+", help="folder of tbf, SentencePiece .model, or tokenizer.json")
    text = evaluate.add_mutually_exclusive_group(required=True)
    text.add_argument("--data", metavar="SOURCE", help="text they were not trained on: file, folder, glob, hf:NAME")
    text.add_argument("--text", metavar="TEXT", help="this text itself")
    add("--column", default="text", metavar="KEY", help="column of parquet, key of jsonl (default: %(default)s)")
    add("--sample-mb", type=float, default=20.0, metavar="MB", help="text to read of --data (default: %(default)s)")


def run_train(arguments: argparse.Namespace) -> int:
    from tbf.data.plan import PrepareOptions, parse_sources
    from tbf.data.sources import Problems, ReadOptions
    from tbf.data.tokenizer import MODEL_FILE
    from tbf.data.tokenizer_tools import train_tokenizer

    if (arguments.out / MODEL_FILE).exists() and not arguments.force:
        raise ConfigError(f"{arguments.out} already holds a tokenizer; pass --force to replace it, or change --out")
    if arguments.sample_gb <= 0:
        raise ConfigError(f"--sample-gb {arguments.sample_gb:g}: above 0, e.g. 1")
    problems = Problems(arguments.strict)
    trained = train_tokenizer(
        parse_sources(arguments.sources),
        arguments.out,
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        sample_gb=arguments.sample_gb,
        options=PrepareOptions(read=ReadOptions(column=arguments.column)),
        problems=problems,
    )
    _name_skipped(problems)
    print(f"{arguments.out}: {trained.vocab_size:,} ids, fingerprint {trained.fingerprint[:12]}")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    from tbf.data.plan import PrepareOptions
    from tbf.data.sources import Problems, ReadOptions
    from tbf.data.tokenizer_tools import evaluate_tokenizers, format_scores, score_texts

    if arguments.text is not None:
        if not arguments.text.strip():
            raise DataError("--text holds no words; give some, or --data SOURCE")
        scores = score_texts(arguments.tokenizers, [arguments.text])
    else:
        options = PrepareOptions(read=ReadOptions(column=arguments.column))
        problems = Problems()
        scores = evaluate_tokenizers(
            arguments.tokenizers,
            arguments.data,
            text_bytes=int(arguments.sample_mb * 1e6),
            options=options,
            problems=problems,
        )
        _name_skipped(problems)
    print(format_scores(scores))
    return 0


def _name_skipped(problems: Problems) -> None:
    for path, reason in problems.files.items():
        print(f"bad file {path}: {reason}", file=sys.stderr)
