"""`tbf fill-mask`: what a model would write in the gaps of a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from tbf.commands import add_verb
from tbf.commands.exports import FAST_HELP

EXAMPLES = """\
  tbf fill-mask runs/mini-1/export "La capital de España es [MASK]."
  tbf fill-mask exported "El [MASK] ladra y el [MASK] maúlla." --top-k 3
  tbf fill-mask exported "Hoy hace [MASK]." --json | jq .
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "fill-mask", run, summary="guess the words behind [MASK]", examples=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("model", metavar="DIR", help="an export: `export/` of a run, or what convert_ckpt.py wrote")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="text with one or more [MASK]")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="candidates per mask (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help=FAST_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object per text instead of a table")


def run(arguments: argparse.Namespace) -> int:
    from tbf.commands.exports import load_with_tokenizer
    from tbf.evaluate.fill_mask import fill_mask

    model, tokenizer = load_with_tokenizer(arguments.model, fast=arguments.fast)
    for text in arguments.texts:
        masks = fill_mask(model, tokenizer, text, arguments.top_k)
        if arguments.json:
            found = [[dataclasses.asdict(candidate) for candidate in candidates] for candidates in masks]
            print(json.dumps({"text": text, "masks": found}, ensure_ascii=False))
            continue
        for number, candidates in enumerate(masks, start=1):
            print(text if len(masks) == 1 else f"{text}   (mask {number} of {len(masks)})")
            width = max(len(candidate.token) for candidate in candidates)
            for candidate in candidates:
                print(f"  {candidate.probability:6.1%}  {candidate.token:{width}}  {candidate.text}")
    return 0
