"""Trains a model: the only program that an engine launches.

deepspeed launch/train.py --ds_config ds_configs/p40_zero2.json                       # Mini on the embedded sample
deepspeed launch/train.py --ds_config ds_configs/p40_zero2.json --preset frankenstein_2048 --data hf:NAME
torchrun --nproc_per_node 2 launch/train.py --ds_config ds_configs/p40_zero2.json --run-dir runs/two
python launch/train.py --ds_config ds_configs/p40_zero2.json --dry-run                # one process, no training
python launch/train.py --ds_config ds_configs/p40_zero2.json --run-dir runs/long --auto-restart 5   # supervised
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from tbf.errors import ConfigError, run_program
from tbf.train.signals import duration


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/train.py", description="Train a hybrid ternary encoder through DeepSpeed.",
        epilog=(__doc__ or "").split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--ds_config", "--deepspeed_config", required=True, metavar="FILE", help="engine configuration, see ds_configs/"
    )
    add("--preset", default="mini", metavar="NAME|FILE.yaml", help="model, data and schedule (default: mini)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        metavar="SOURCE",
        help="file, folder or glob of parquet/jsonl/txt, hf:NAME, shards, or sample",
    )
    source.add_argument("--mix", dest="data", metavar="A=0.7,B=0.3", help="sources with their shares of the rows")
    add("--tokenizer", metavar="PATH", help="folder or .model file (default: train one on the source, once)")
    add(
        "--run-dir",
        metavar="DIR",
        help="run folder (default: runs/<preset>-<n>, an unfinished one of these settings first)",
    )
    add("--max-steps", type=int, metavar="N", help="optimizer steps of the whole run")
    add(
        "--max-time",
        type=duration,
        metavar="3h30m",
        help="save and stop after this time (exit 0); leave a step and a save before a queue's limit",
    )
    add("--resume", default="auto", metavar="auto|never|PATH", help="auto: continue the run folder's newest checkpoint")
    add(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="a.b=c",
        help="override a preset key (repeatable)",
    )
    add(
        "--auto-restart",
        type=int,
        default=0,
        metavar="N",
        help="supervise: start the launcher, and start it again when the run fails, up to N times",
    )
    add("--launcher", default="deepspeed", metavar="'CMD ...'", help="what --auto-restart starts (default: deepspeed)")
    add("--restart-pause", type=duration, default=10.0, metavar="10s", help="before a restart; doubles each time")
    add("--ignore-plan", action="store_true", help="start even if the plan says that memory will not suffice")
    add("--dry-run", action="store_true", help="check everything up to one forward and backward pass, then leave")
    add("--local_rank", "--local-rank", type=int, default=0, help="given by the launcher; ignored")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.auto_restart > 0:
        return supervise_run(arguments)
    from tbf.train.environment import choose_accelerator, discover_process, set_threads, tune_allocator

    process = discover_process()
    threads = set_threads(process)  # before torch is imported: OpenMP reads its variable once
    allocator = tune_allocator()
    cpu_reason = choose_accelerator()
    from tbf.train.run import train

    return train(arguments, process, threads, allocator, cpu_reason)


def supervise_run(arguments: argparse.Namespace) -> int:
    """Stands above the launcher instead of training."""
    from tbf.train.supervisor import supervise, supervised_command

    if "RANK" in os.environ:
        raise ConfigError(
            "--auto-restart supervises the launcher: start it with plain `python launch/train.py --auto-restart N`, "
            "and name the launcher with --launcher 'deepspeed --num_gpus 2'"
        )
    if not arguments.run_dir or arguments.resume != "auto":
        raise ConfigError("--auto-restart needs --run-dir DIR, whose newest checkpoint it continues (--resume auto)")
    command = supervised_command(sys.argv[1:], arguments.launcher)
    return supervise(command, Path(arguments.run_dir), arguments.auto_restart, arguments.restart_pause)


if __name__ == "__main__":
    sys.exit(run_program(main))
