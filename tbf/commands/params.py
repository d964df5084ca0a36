"""`tbf params`: where a preset's parameters and operations are."""

from __future__ import annotations

import argparse
from typing import Any

from tbf.commands import add_verb

EXAMPLES = """\
  tbf params mini
  tbf params frankenstein_2048 --set model.num_layers=24
  tbf params my_preset.yaml
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "params", run, summary="count a preset's parameters and operations, part by part", examples=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("preset", metavar="NAME|FILE.yaml", help="shipped preset or a file")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="a.b=c", help="override a key (repeatable)"
    )


def run(arguments: argparse.Namespace) -> int:
    from tbf.config import load_run_config
    from tbf.model.flops import build_meta, forward_flops_per_token, parameters_by_part

    settings = load_run_config(arguments.preset, arguments.overrides)
    config = settings.model.replace(vocab_size=settings.data.wanted_vocab_size)
    seq_len, masked = settings.data.seq_len, settings.data.mask_rate
    parameters, flops = parameters_by_part(config), forward_flops_per_token(config, seq_len, masked)
    total, work = sum(parameters.values()), sum(flops.values())
    print(f"{settings.preset}: {config.num_layers} layers of width {config.hidden_size}, {config.num_loops} loop(s) = "
          f"{config.num_layers * config.num_loops} layer visits, vocabulary {config.vocab_size:,}")  # fmt: skip
    print(f"  {'':14}{'parameters':>15}{'':8}{'forward MFLOP/token':>21}   (rows of {seq_len}, {masked:.0%} masked)")
    for part, count in sorted(parameters.items(), key=lambda item: -item[1]):
        part_work = flops.get(part, 0.0)
        print(f"  {part:14}{count:>15,}{count / total:8.1%}{part_work / 1e6:>21,.2f}{part_work / work:8.1%}")
    print(f"  {'total':14}{total:>15,}{'':8}{work / 1e6:>21,.2f}")
    if config.use_moe:
        idle = parameters["ffn"] * (1 - config.top_k_experts / config.num_experts)
        share = f"{config.top_k_experts} of {config.num_experts} experts"
        print(f"  a token reaches {share}: {total - idle:,.0f} parameters act on it")
    ternary = count_ternary(build_meta(config))
    packed = (4 * (total - ternary) + ternary / 5) / 1e6
    print(f"  ternary {ternary / total:.1%}; {4 * total / 1e6:,.1f} MB in FP32, about {packed:,.1f} MB packed")
    return 0


def count_ternary(model: Any) -> int:
    """Parameters that are quantised to three values: the weights of ternary projections and experts."""
    return sum(module.weight.numel() for module in model.modules() if getattr(module, "ternary", False))
