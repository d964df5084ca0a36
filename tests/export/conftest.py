from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.export.tiny_runs import save_run_files, tiny_config, tiny_tokenizer
from tests.export.toy import Saved, save_everything
from tests.helpers.gloo import run_distributed

RUNS = {1: {"zero2": 2}, 2: {"zero1": 1, "zero3": 3}}
"""Ranks -> run folders and their ZeRO stage."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Saved, dict[str, tuple[Path, dict]]]:
    """Everything that DeepSpeed has to write: two short jobs, started once even when pytest runs in parallel."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"
    root.mkdir(exist_ok=True)
    toys, runs = {}, {}
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for world_size, stages in RUNS.items():
            folder = root / f"ranks{world_size}"
            if not (folder / "live.pt").exists():
                _save(folder, world_size, stages)
            live_toys, live_runs = torch.load(folder / "live.pt")
            toys |= {(stage, world_size): (folder / f"toy{stage}" / "tag", live) for stage, live in live_toys.items()}
            runs |= {name: (folder / name, live) for name, live in live_runs.items()}
    return toys, runs


def _save(folder: Path, world_size: int, stages: dict[str, int]) -> None:
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    for name in stages:
        save_run_files(folder / name, config, tokenizer)
    torch.save(run_distributed(save_everything, world_size, folder, stages, config)[0], folder / "live.pt")


@pytest.fixture(scope="session")
def toy_checkpoints(saved: tuple) -> Saved:
    """(ZeRO stage, ranks) -> (checkpoint folder, weights of the model that it was saved from)."""
    if (3, 11, 0) <= sys.version_info[:3] < (3, 11, 4):
        pytest.skip("DeepSpeed's own files take a call of getattr to open, pickled by this Python")
    return saved[0]


@pytest.fixture(scope="session")
def runs(saved: tuple) -> dict[str, tuple[Path, dict[int, dict[str, torch.Tensor]]]]:
    """Name -> (run folder, {step: weights of the live model}). Never to be changed: copy first."""
    return saved[1]
