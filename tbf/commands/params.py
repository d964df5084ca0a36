"""`tbf params`: where a preset's parameters are."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from tbf.commands import add_verb

EXAMPLES = """\
  tbf params mini
  tbf params frankenstein_2048 --set model.num_layers=24
  tbf params my_preset.yaml
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "params", run, summary="count a preset's parameters, part by part", examples=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("preset", metavar="NAME|FILE.yaml", help="shipped preset or a file")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="a.b=c", help="override a key (repeatable)"
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from tbf.config import load_run_config
    from tbf.model.encoder import TormentedBertFrankenstein

    settings = load_run_config(arguments.preset, arguments.overrides)
    config = settings.model.replace(vocab_size=settings.data.wanted_vocab_size)
    with torch.device("meta"):  # shapes without memory
        model = TormentedBertFrankenstein(config)
    parts, ternary = count_parts(model)
    total, visits = sum(parts.values()), config.num_layers * config.num_loops
    print(f"{settings.preset}: {config.num_layers} layers of width {config.hidden_size}, {config.num_loops} loop(s) = "
          f"{visits} layer visits, vocabulary {config.vocab_size:,}")  # fmt: skip
    width = max(map(len, parts))
    for part, count in parts.items():
        print(f"  {part:{width}}  {count:>15,}  {count / total:6.1%}")
    print(f"  {'total':{width}}  {total:>15,}")
    packed = (4 * (total - ternary) + ternary / 5) / 1e6
    print(f"  ternary {ternary / total:.1%}; {4 * total / 1e6:,.1f} MB in FP32, about {packed:,.1f} MB packed")
    return 0


def count_parts(model: Any) -> tuple[dict[str, int], int]:
    """(parameters of each part: embeddings, mixers by name, feed-forward, ...; how many of them are ternary)."""
    from tbf.model.bitlinear import BitLinear

    names = [name for name, _ in model.config.layer_types]
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        top, *rest = name.split(".")
        if top == "layers":
            inner = rest[1]
            top = f"mixer {names[int(rest[0])]}" if inner == "mixer" else f"layer {inner}"
        counts[top] += parameter.numel()
    ternary = sum(m.weight.numel() for m in model.modules() if isinstance(m, BitLinear) and m.ternary)
    return dict(counts), ternary
