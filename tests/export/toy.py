"""Real DeepSpeed checkpoints of a toy network that has everything an export must get right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tbf.model.config import UltraConfig
from tests.export.tiny_runs import save_run

Saved = dict[tuple[int, int], tuple[Path, dict[str, torch.Tensor]]]
"""(ZeRO stage, ranks) -> (checkpoint folder, weights of the model that it was saved from)."""


class ToyNet(nn.Module):
    """Tied weights, sizes that don't divide by the ranks, frozen weights, persistent and other buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.gain = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.down(self.up(self.table(ids)).relu()) * self.gain.sum() + self.frozen.sum()
        return self.head(hidden)


def save_everything(
    rank: int, world_size: int, root: Path, runs: dict[str, int], config: UltraConfig
) -> tuple[dict[int, Any], dict[str, Any]]:
    """ToyNets under every stage, and one tiny run for each (name, stage) of `runs`; returns all live weights."""
    toys = save_checkpoints(rank, world_size, root, (1, 2, 3))
    return toys, {name: save_run(rank, world_size, root / name, stage, config) for name, stage in runs.items()}


def save_checkpoints(rank: int, world_size: int, folder: Path, stages: tuple[int, ...], offload: bool = False) -> Any:
    """Saves a ToyNet after three steps under each ZeRO stage; returns {stage: weights of the live model}."""
    return {stage: _save_checkpoint(rank, folder / f"toy{stage}", stage, offload) for stage in stages}


def _save_checkpoint(rank: int, folder: Path, stage: int, offload: bool) -> dict[str, torch.Tensor]:
    import deepspeed

    torch.manual_seed(0)
    net = ToyNet()
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    zero: dict[str, Any] = {"stage": stage, "round_robin_gradients": stage == 2}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2}}
        engine, *_ = deepspeed.initialize(model=net, model_parameters=groups, config=config)
    else:
        engine, *_ = deepspeed.initialize(
            model=net,
            optimizer=torch.optim.AdamW(groups, lr=1e-2),
            config={**config, "zero_allow_untested_optimizer": True},
        )
    for step in range(3):
        ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(nn.functional.cross_entropy(engine(ids).flatten(0, 1), ids.flatten()))
        engine.step()
    engine.save_checkpoint(str(folder), tag="tag", save_latest=True)
    # On every rank: gathering is collective.
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        return {name: value.detach().clone() for name, value in net.state_dict().items()}
