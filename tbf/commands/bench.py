"""`tbf bench gemm`: verifies and times the integer kernels of this machine."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tbf.commands import add_verb, add_verbs
from tbf.errors import ConfigError, HardwareError

EXAMPLES = """\
  tbf bench gemm
  tbf bench gemm --preset frankenstein_2048
  tbf bench gemm --device cuda:1 --tokens 4096 --json > gemm.json
"""


def register(verbs: Any) -> None:
    parser = add_verb(verbs, "bench", None, summary="verify and time the kernels of this machine", examples=EXAMPLES)
    gemm = add_verb(
        add_verbs(parser), "gemm", run_gemm, summary="verify and time every integer GEMM of ternary compute here",
        about="Each one is compared bit for bit with FP64 products, at awkward shapes and at the preset's, forward and "
        "backward, and timed beside FP32 with quantisation included. Leaves 5 if one that should work here does not: "
        "please report the output then.",
        examples=EXAMPLES,
    )  # fmt: skip
    add = gemm.add_argument
    add("--preset", default="mini", metavar="NAME|FILE.yaml", help="whose shapes (default: mini)")
    add("--tokens", type=int, metavar="N", help="tokens a product (default: a micro batch of the preset)")
    add("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="default: the first card, else the CPU")
    add("--mode", default="int8", choices=("int8", "int8_hilo"), help="rounding of gradients (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object instead of the table")


def run_gemm(arguments: argparse.Namespace) -> int:
    if arguments.tokens is not None and arguments.tokens < 1:
        raise ConfigError(f"--tokens {arguments.tokens}: at least 1, e.g. 2048")
    from tbf.train.environment import ProcessInfo, set_threads, tune_allocator

    set_threads(ProcessInfo(0, 0, 1, 1, "python"))  # as in training, before torch is imported
    tune_allocator()
    from tbf.config import load_run_config
    from tbf.hardware.gemm_bench import bench_gemm, choose_device
    from tbf.model.bitlinear import ternary_shapes
    from tbf.model.flops import build_meta

    settings = load_run_config(arguments.preset)
    shapes = ternary_shapes(build_meta(settings.model))
    if not shapes:
        raise ConfigError(f"--preset {arguments.preset}: none of its layers is ternary; take another, e.g. mini")
    tokens = arguments.tokens or settings.train.micro_batch_size * settings.data.seq_len
    report = bench_gemm(
        choose_device(arguments.device), shapes, tokens, mode=arguments.mode,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    report.machine["preset"] = f"{settings.preset}, {tokens} tokens"
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.text())
    return HardwareError.exit_code if report.faults else 0
