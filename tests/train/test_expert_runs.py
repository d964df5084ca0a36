"""Whole runs with experts, aux-free balancing and random loops: equal on any number of ranks, exact across a resume."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from tbf.export.plain import export_run
from tests.helpers.runs import DS_ZERO2, DS_ZERO3, metrics, train, write_preset

# Without the balance and z losses, which are means over micro-batches: those depend on how rows are split.
SETTINGS = [
    "model.use_moe=true", "model.ffn_hidden_size=32", "model.router_aux_free=true", "model.router_bias_rate=0.02",
    "model.router_balance_coef=0.0", "model.router_z_coef=0.0", "model.use_bitnet=false", "model.num_layers=4",
    "model.layer_pattern=[retnet,titan_attn,mamba,ode]", "train.stochastic_loops=true", "train.decay_share=0.0",
    "train.seed=9",  # which draws every loop count, also after the resume
]  # fmt: skip
STEPS = 12


def run(cache, name, *, ranks=1, ds_config=DS_ZERO2, max_steps=STEPS):
    run_dir = cache / name
    preset = write_preset(cache, micro_batch_size=4 // ranks, eval_every=6, save_every=6)
    overrides = [word for setting in SETTINGS for word in ("--set", setting)]
    train(
        "--preset", preset, "--run-dir", run_dir, "--max-steps", max_steps, *overrides,
        cache=cache, ranks=ranks, ds_config=ds_config,
    )  # fmt: skip
    return run_dir


def numbers(run_dir, column):
    return [float(value) for (value,) in metrics(run_dir, column) if value]


def weights(run_dir):
    """Of the last checkpoint, through the export: buffers must survive it too."""
    return load_file(export_run(run_dir, run_dir / "plain", force=True) / "model.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def straight(cache):
    return run(cache, "straight")


def test_routers_are_reported_and_biases_move(straight):
    assert set(numbers(straight, "loops")) == {1, 2, 3}
    assert all(0 <= low < 0.25 < high <= 0.5 for low, high in zip(
        numbers(straight, "expert_share_min"), numbers(straight, "expert_share_max"), strict=True
    ))  # fmt: skip
    assert all(0 < entropy <= math.log(4) + 1e-6 for entropy in numbers(straight, "router_entropy"))
    assert numbers(straight, "router_dropped") == [0.0] * STEPS
    assert all(0 < balance <= 2 for balance in numbers(straight, "router_balance"))
    biases = {name: bias for name, bias in weights(straight).items() if name.endswith("router_bias")}
    assert len(biases) == 4 and all(bias.any() for bias in biases.values())


def test_two_ranks_under_zero_3_take_the_same_steps(straight, cache):
    other = run(cache, "zero3", ranks=2, ds_config=DS_ZERO3)
    assert metrics(other, "step", "loops", "expert_share_max") == metrics(straight, "step", "loops", "expert_share_max")
    for column in ("loss", "val_loss"):
        assert numbers(other, column) == pytest.approx(numbers(straight, column), abs=1e-4)
    ours, theirs = weights(other), weights(straight)
    for name in (name for name in theirs if name.endswith("router_bias")):
        assert torch.equal(ours[name], theirs[name])


def test_a_resumed_run_repeats_loops_and_biases(straight, cache):
    run(cache, "resumed", max_steps=6)
    resumed = run(cache, "resumed")
    columns = ("step", "loss", "grad_norm", "loops", "expert_share_min", "router_entropy")
    assert metrics(resumed, *columns) == metrics(straight, *columns)
    ours, theirs = weights(resumed), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
