"""Runs launch/train.py as a user would, on a model and a text that are small enough for a test."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DS_ZERO2, DS_ZERO3 = ROOT / "ds_configs" / "p40_zero2.json", ROOT / "ds_configs" / "p40_zero3.json"

TINY = {
    "model": {
        "hidden_size": 32,
        "num_layers": 6,
        "num_loops": 2,
        "num_heads": 2,
        "retention_heads": 2,
        "mamba_state_size": 8,
        "mamba_head_dim": 16,
        "factorized_embedding_dim": 16,
        "norm_type": "derf",
    },
    "data": {
        "seq_len": 32,
        "vocab_size": 400,
        "num_workers": 0,
        "validation_share": 0.1,
        "mask_rate_end": 0.15,
        "whole_words": True,
    },
    "train": {
        "max_steps": 20,
        "micro_batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "eval_every": 10,
        "eval_rows": 6,
        "save_every": 10,
        "log_every": 1,
        "tensorboard": False,
        "export_at_end": False,
    },
}


def write_preset(folder: Path, **train: object) -> Path:
    """A preset file for the tiny model; keyword arguments override keys of its train section."""
    path = folder / "tiny.yaml"
    data = {**TINY["data"], "cache_dir": str(folder / "data")}
    preset = {**TINY, "data": data, "train": {**TINY["train"], **train}}
    fresh = folder / f".tiny-{os.getpid()}.yaml"  # several ranks may write and read it at once
    fresh.write_text(yaml.safe_dump(preset), encoding="utf-8")
    return fresh.replace(path)


def environment(**extra: str) -> dict[str, str]:
    """One thread a rank, the CPU; none of the launcher variables of the test itself."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return {**env, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **extra}


def command(*arguments: object, ranks: int = 1, ds_config: Path = DS_ZERO2) -> list[str]:
    """The command line of a run: plain python for one rank, torchrun for more."""
    program = [str(ROOT / "launch" / "train.py"), "--ds_config", str(ds_config), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *program]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *program]


def train(*arguments: object, cache: Path, ranks: int = 1, ds_config: Path = DS_ZERO2, expect: int = 0, **env: str):
    """Runs to the end and checks the exit code; returns the finished process with its output as text."""
    line = command(*arguments, ranks=ranks, ds_config=ds_config)
    done = subprocess.run(line, env=environment(**env), cwd=cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def metrics(run_dir: Path, *columns: str) -> list[tuple[str, ...]]:
    """The rows of metrics.csv in force, as the texts of the named columns."""
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row.get("superseded") != "1"]
    return [tuple(row[column] for column in columns) for row in rows]


def train_here(rank: int, world_size: int, preset: Path, run_dir: Path, *overrides: str, ds_config: Path = DS_ZERO2):
    """A whole run inside this process, on the process group of `run_distributed`; returns the exit code."""
    import argparse

    import torch

    from tbf.train import run as program
    from tbf.train.build_ops import prepare_ops
    from tbf.train.ds_config import load_ds_config
    from tbf.train.environment import ProcessInfo
    from tests.helpers.gloo import deepspeed_on_gloo

    deepspeed_on_gloo()
    arguments = argparse.Namespace(
        preset=str(preset), overrides=list(overrides), ds_config=str(ds_config), data=None, tokenizer=None,
        run_dir=str(run_dir), max_steps=None, max_time=None, resume="auto", dry_run=False,
        ignore_plan=False,
    )  # fmt: skip
    engine, run = load_ds_config(ds_config, program._run_config(arguments), world_size)
    assert prepare_ops(engine.needs_cpu_adam, lambda text: None)
    process = ProcessInfo(rank, rank, world_size, world_size, "test")
    return program._train(arguments, process, run, engine, torch.device("cpu"), lambda text: None)
