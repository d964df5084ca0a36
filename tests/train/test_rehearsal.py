"""A rehearsed run is the same run, bit for bit, and what does not fit fails in the rehearsal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tbf.config import load_run_config
from tbf.train.rehearsal import largest_batch
from tests.helpers.gloo import run_distributed
from tests.helpers.runs import DS_ZERO2, DS_ZERO3, metrics, train_here, write_preset

DROPOUT = ("model.dropout=0.1", "train.gradient_accumulation_steps=3", "train.micro_batch_size=2")
EXPERTS = ("model.use_moe=true", "model.num_experts=4", "model.top_k_experts=2", "model.router_aux_free=true")
ONE_RANK = {"zero2": (DS_ZERO2, DROPOUT), "zero3": (DS_ZERO3, ("train.stochastic_loops=true",))}
TWO_RANKS = {"experts": (DS_ZERO2, (*EXPERTS, "train.micro_batch_size=2")), "zero3": (DS_ZERO3, ())}


def with_and_without(rank, world_size, folder, cases):
    """Each case twice for four steps, plain and rehearsed; returns the number of rehearsals."""
    from tbf.model.bitlinear import invalidate_ternary
    from tbf.train import run as program

    rehearsals, rehearse = [], program.rehearse

    def counted(*arguments):
        rehearsals.append(rehearse(*arguments))
        return rehearsals[-1]

    program.rehearse = counted
    preset = write_preset(Path(folder), max_steps=4, warmup_steps=0, eval_every=2, save_every=4)
    for case, (ds_config, overrides) in cases.items():
        for name in ("plain", "rehearsed"):
            changes = (*overrides, f"train.rehearse={str(name == 'rehearsed').lower()}")
            run_dir = Path(folder) / case / name
            assert train_here(rank, world_size, preset, run_dir, *changes, ds_config=ds_config) == 0
            invalidate_ternary()
    return len(rehearsals)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rehearsed_run_is_the_same_run(tmp_path, ranks):
    cases = ONE_RANK if ranks == 1 else TWO_RANKS
    assert run_distributed(with_and_without, ranks, str(tmp_path), cases, timeout_s=400) == [len(cases)] * ranks
    columns = ("step", "loss", "grad_norm", "lr", "skipped", "val_loss", "tokens")
    for case in cases:
        plain, rehearsed = tmp_path / case / "plain", tmp_path / case / "rehearsed"
        assert metrics(plain, *columns) == metrics(rehearsed, *columns) != []
        folder = Path("checkpoints") / "step-00000004"
        files = sorted((plain / folder).glob("*.pt"))
        assert len(files) >= 2
        for path in files:
            assert_same(load(path), load(rehearsed / folder / path.name), f"{case}: {path.name}")


def load(path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler]):
        return torch.load(path, weights_only=True)


def assert_same(a, b, where):
    """Weights, moments, counters and states of random generators, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{number}]")
    elif isinstance(a, int | float | str | bool):
        assert a == b, where


def test_the_largest_batch_is_that_of_the_highest_mask_rate():
    run = load_run_config("mini", ["data.seq_len=100", "data.mask_rate=0.2", "data.mask_rate_end=0.4"])
    batch = largest_batch(run)
    assert batch["input_ids"].shape == batch["segment_ids"].shape == (8, 100)
    assert batch["masked_positions"].shape == batch["masked_labels"].shape == (8, 40)
    assert batch["segment_ids"].unique().tolist() == [1, 2]
    assert int(batch["input_ids"].max()) < run.model.vocab_size
