"""`tbf plan`: what a run will need, and how fast it will be, before it starts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from tbf.commands import add_verb

EXAMPLES = """\
  tbf plan frankenstein_2048 --ds_config ds_configs/p40_zero2.json
  tbf plan frankenstein_2048_moe --ds_config ds_configs/p40_zero2.json --gpus 2 --micro-batch 4 --suggest
  tbf plan mini --ds_config ds_configs/p40_zero2.json --gpu auto --tokens 1e9 --json
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "plan", run, summary="predict a run's memory, traffic and time", examples=EXAMPLES,
        about="Leaves 5 when it does not fit.",
    )  # fmt: skip
    add = parser.add_argument
    add("preset", metavar="NAME|FILE.yaml", help="shipped preset or a file")
    add("--ds_config", required=True, metavar="FILE", help="engine configuration, see ds_configs/")
    add(
        "--gpu",
        default="p40",
        metavar="NAME",
        help="p40 (default), p100, v100, 1080ti, t4, 3090, a100, h100, cpu, auto",
    )
    add("--gpus", type=int, metavar="N", help="cards, or ranks on the CPU, of each node (default: 1; auto: all)")
    add("--nodes", type=int, default=1, metavar="N", help="machines alike (default: 1)")
    add("--host-ram", type=float, metavar="GB", help="memory of each node (default: 128; cpu and auto: this machine's)")
    add("--disk", type=float, metavar="GB", help="free space for checkpoints and data (default: not judged)")
    add("--network", type=float, default=10.0, metavar="GBIT", help="between nodes, per second (default: 10)")
    add("--latency", type=float, default=0.1, metavar="MS", help="of a message between nodes (default: 0.1)")
    add("--micro-batch", type=int, metavar="N", help="rows per rank and micro-step")
    add("--seq-len", type=int, metavar="N", help="tokens a row")
    add("--tokens", type=float, metavar="N", help="also say how long a training on N tokens takes")
    add("--set", action="append", default=[], dest="overrides", metavar="a.b=c", help="override a key (repeatable)")
    add("--suggest", action="store_true", help="search for the fastest settings of this machine that fit")
    add("--json", action="store_true", help="one JSON object instead of the report")


def run(arguments: argparse.Namespace) -> int:
    from tbf.config import load_run_config
    from tbf.errors import ConfigError
    from tbf.planning.changes import write_up
    from tbf.planning.machine import choose_machine
    from tbf.planning.plan import Planner
    from tbf.planning.report import report, suggestion
    from tbf.planning.search import suggest, with_cures
    from tbf.train.ds_config import load_ds_config

    if arguments.tokens is not None and not 0 < arguments.tokens < math.inf:
        raise ConfigError(f"--tokens is {arguments.tokens}; give the length of the training, e.g. 1e9")
    machine = choose_machine(
        arguments.gpu, gpus=arguments.gpus, nodes=arguments.nodes, host_gb=arguments.host_ram, disk_gb=arguments.disk,
        network_gbit=arguments.network, latency_ms=arguments.latency,
    )  # fmt: skip
    flags = {"train.micro_batch_size": arguments.micro_batch, "data.seq_len": arguments.seq_len}
    overrides = [*arguments.overrides, *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    settings = load_run_config(arguments.preset, overrides)
    explicit = {override.partition("=")[0].partition(".")[2] for override in overrides}
    resolved, settings = load_ds_config(arguments.ds_config, settings, machine.ranks, explicit)
    settings = settings.replace(model={"vocab_size": settings.data.wanted_vocab_size})
    engine = resolved.as_planned()
    planner = Planner(machine, say=lambda text: print(text, file=sys.stderr, flush=True))
    plan = with_cures(planner, planner.plan(settings, engine), settings, engine)
    found = suggest(planner, settings, engine) if arguments.suggest else None
    if arguments.json:
        result = plan.to_dict()
        if arguments.tokens:
            result |= {"tokens": arguments.tokens, "days": arguments.tokens / plan.tokens_per_day}
        if found is not None:
            change, best = found
            changes = write_up((settings, engine), (change.run, change.engine))
            result["suggestion"] = {"changes": changes, **best.to_dict()}
        print(json.dumps(result))
    else:
        print(report(plan, arguments.tokens))
        if arguments.suggest:
            print()
            print(suggestion((settings, engine), plan, found))
    return 0 if plan.fits else 5
