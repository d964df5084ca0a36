"""A stand-in for a DeepSpeed engine: the calls and files that checkpoints depend on, in milliseconds."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


class FakeEngine:
    """Holds one weight and one optimizer moment per rank, saved under DeepSpeed's file names."""

    def __init__(self, rank: int = 0, *, stage: int = 2, hidden: int = 8, order: tuple[str, ...] = ("a", "b")) -> None:
        self.rank, self.stage, self.order, self.hidden = rank, stage, order, hidden
        self.weight = torch.arange(float(hidden))
        self.moment = torch.full((hidden,), float(rank))
        self.module = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"hidden_size": self.hidden}))
        self.optimizer = SimpleNamespace(optimizer=torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
        self.checkpoint_engine: Any = None
        self.save_non_zero_checkpoint = rank == 0

    def zero_optimization_stage(self) -> int:
        return self.stage

    def _get_zero_param_shapes(self) -> list[OrderedDict]:
        return [OrderedDict((name, torch.Size([self.hidden])) for name in self.order)]

    def save_checkpoint(self, save_dir: str, tag: str, client_state: dict, save_latest: bool) -> None:
        assert not save_latest
        folder = Path(save_dir) / tag
        if self.save_non_zero_checkpoint:
            self.checkpoint_engine.save(
                {"module": {"a": self.weight}, **client_state}, str(folder / "mp_rank_00_model_states.pt")
            )
        self.checkpoint_engine.save({"moment": self.moment}, str(folder / self._optimizer_file()))
        if dist.is_initialized():
            dist.barrier()

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str, dict]:
        folder = Path(load_dir) / tag
        self.weight = self.checkpoint_engine.load(str(folder / "mp_rank_00_model_states.pt"))["module"]["a"]
        self.moment = self.checkpoint_engine.load(str(folder / self._optimizer_file()))["moment"]
        return str(folder), {}

    def _optimizer_file(self) -> str:
        return f"zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt"
