from __future__ import annotations

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
    """Everything that DeepSpeed has to write, made by two short jobs, since starting one takes seconds."""
    toys, runs = {}, {}
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    for world_size, stages in RUNS.items():
        root = tmp_path_factory.mktemp(f"ranks{world_size}")
        for name in stages:
            save_run_files(root / name, config, tokenizer)
        live_toys, live_runs = run_distributed(save_everything, world_size, root, stages, config)[0]
        toys.update({(stage, world_size): (root / f"toy{stage}" / "tag", live_toys[stage]) for stage in live_toys})
        runs.update({name: (root / name, live_runs[name]) for name in stages})
    return toys, runs


@pytest.fixture(scope="session")
def toy_checkpoints(saved: tuple) -> Saved:
    """(ZeRO stage, ranks) -> (checkpoint folder, weights of the model that it was saved from)."""
    return saved[0]


@pytest.fixture(scope="session")
def runs(saved: tuple) -> dict[str, tuple[Path, dict[int, dict[str, torch.Tensor]]]]:
    """Name -> (run folder, {step: weights of the live model}). Never to be changed: copy first."""
    return saved[1]
