from __future__ import annotations

import json

import pytest

from tbf.config import load_run_config
from tbf.errors import ConfigError
from tbf.train.ds_config import load_ds_config

BASE = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def resolve(tmp_path):
    def function(content, world_size=1, explicit=(), overrides=()):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_ds_config(path, load_run_config("mini", overrides), world_size, explicit)

    return function


@pytest.mark.parametrize("name", ["p40_zero2.json", "p40_zero3.json"])
def test_the_shipped_configs_take_the_presets_values(repo_root, name):
    engine, run = load_ds_config(repo_root / "ds_configs" / name, load_run_config("mini"), world_size=2)
    assert engine.config["train_micro_batch_size_per_gpu"] == run.train.micro_batch_size
    assert engine.config["train_batch_size"] == 2 * run.train.micro_batch_size * run.train.gradient_accumulation_steps
    assert engine.config["optimizer"]["params"]["lr"] == run.train.learning_rate
    assert engine.offload_optimizer and engine.needs_cpu_adam and engine.checkpointing.granularity == "layer"


def test_explicit_values_win_over_the_preset(resolve):
    engine, run = resolve(
        {
            **BASE,
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "betas": [0.8, 0.9]}},
        }
    )
    assert (run.train.micro_batch_size, run.train.gradient_accumulation_steps) == (3, 2)
    assert (run.train.learning_rate, run.train.beta1, run.train.beta2) == (5e-4, 0.8, 0.9)
    assert engine.config["train_batch_size"] == 6
    assert engine.config["optimizer"]["params"]["betas"] == [0.8, 0.9]


def test_two_explicit_values_that_differ_are_refused(resolve):
    content = {**BASE, "train_micro_batch_size_per_gpu": 3}
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size=4 was set"):
        resolve(content, explicit={"micro_batch_size"}, overrides=["train.micro_batch_size=4"])
    _, run = resolve(content, explicit={"micro_batch_size"}, overrides=["train.micro_batch_size=3"])
    assert run.train.micro_batch_size == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ({}, "stage is 0"),
        ({"zero_optimization": {"stage": 4}}, "use 1, 2 or 3"),
        ({**BASE, "fp16": {"enabled": True}}, "'fp16' is on"),
        ({**BASE, "bf16": {"enabled": True}}, "'bf16' is on"),
        ({**BASE, "scheduler": {"type": "WarmupLR"}}, "remove 'scheduler'"),
        ({**BASE, "optimizer": {"type": "Lamb"}}, "tbf trains with AdamW"),
        ({**BASE, "optimizer": {"params": {"max_grad_norm": 1}}}, "gradient_clipping"),
        ({**BASE, "optimizer": {"params": {"betas": 0.9}}}, "two numbers"),
        ({**BASE, "optimizer": {"params": {"lr": "high"}}}, "give a number"),
        ({**BASE, "train_batch_size": 7}, "contradicts micro batch"),
        ({**BASE, "train_micro_batch_size_per_gpu": 2.5}, "give a whole number"),
        ({**BASE, "train_micro_batch_size_per_gpu": 0}, "at least 1"),
        ({**BASE, "steps_per_print": "auto"}, "'steps_per_print' is"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "'zero_optimization.reduce_bucket_size'"),
        ({**BASE, "activation_checkpointing": {"granularity": "leyer"}}, "choose none, layer, loop"),
        ({**BASE, "activation_checkpointing": {"granulariti": "layer"}}, "did you mean 'granularity'"),
        ({**BASE, "activation_checkpointing": {"partition_activations": True}}, "needs model parallelism"),
    ],
)
def test_wrong_configs_are_one_line_errors(resolve, content, words):
    with pytest.raises(ConfigError) as caught:
        resolve(content)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_lists_the_shipped_ones(tmp_path, repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    with pytest.raises(ConfigError, match=r"no ds_config at .*p40_zero2.json"):
        load_ds_config(tmp_path / "none.json", load_run_config("mini"), 1)


def test_checkpointing_is_off_without_its_block_and_deepspeed_never_sees_the_granularity(resolve):
    assert resolve(BASE)[0].checkpointing.granularity == "none"
    engine, _ = resolve({**BASE, "activation_checkpointing": {"granularity": "loop", "cpu_checkpointing": False}})
    assert engine.checkpointing.granularity == "loop"
    assert "granularity" not in engine.config["activation_checkpointing"]


def test_offload_with_torch_adam_needs_no_compiled_operator(resolve):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert resolve({"zero_optimization": zero})[0].needs_cpu_adam
    assert not resolve({"zero_optimization": zero, "optimizer": {"params": {"torch_adam": True}}})[0].needs_cpu_adam
    assert not resolve(BASE)[0].needs_cpu_adam
