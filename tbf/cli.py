"""`tbf VERB ...`: everything besides training and conversion, which are programs of their own."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import tbf
from tbf.commands import (
    add_verbs,
    bench,
    checkpoints,
    data,
    doctor,
    embed,
    evaluate,
    fill_mask,
    finetune,
    params,
    plan,
    report,
    tokenizer,
)
from tbf.errors import run_program

EXAMPLES = """\
examples:
  tbf fill-mask runs/mini-1/export "La capital de España es [MASK]."
  tbf embed runs/mini-1/export --file sentences.txt --out vectors.npy
  tbf eval runs/mini-1/export held-out.txt
  tbf finetune runs/mini-1/export eval_es/pos_ud_gsd
  tbf report runs/mini-1
  tbf params frankenstein_2048
  tbf doctor
  tbf bench gemm

training: deepspeed launch/train.py --ds_config ds_configs/p40_zero2.json
plain weights of a run: python tools/convert_ckpt.py runs/mini-1 exported

exit codes: 0 done, 2 wrong usage or config, 3 data, 4 checkpoint or export, 5 hardware, 6 training halted
"""
VERBS = (fill_mask, embed, evaluate, finetune, report, tokenizer, data, params, plan, checkpoints, bench, doctor)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tbf",
        description="Hybrid ternary encoders: tokenizers, data, and trained models at work.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tbf {tbf.__version__}")
    verbs = add_verbs(parser)
    for verb in VERBS:
        verb.register(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_program(lambda: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
