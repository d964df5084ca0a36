from __future__ import annotations

import json
import os

import pytest

from tbf.config import load_run_config
from tbf.errors import ConfigError
from tbf.train import ds_keys, ds_values
from tbf.train.ds_config import ActivationCheckpointing, load_ds_config

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
        ({**BASE, "scheduler": {"type": "WarmupLR"}}, "learning-rate schedule; remove it"),
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
        ({**BASE, "activation_checkpointing": {"number_checkpoints": 4}}, "write granularity"),
        ({**BASE, "activation_checkpointing": {"cpu_checkpointing": "yes"}}, "write true or false"),
        ({**BASE, "train_microbatch_size_per_gpu": 2}, "did you mean 'train_micro_batch_size_per_gpu'"),
        ({"zero_optimization": {"stage": 2, "reduce_buckets": 5}}, "did you mean 'reduce_bucket_size'"),
        ({"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 5}}, "does nothing at stage 2"),
        ({"zero_optimization": {"stage": 3, "round_robin_gradients": True}}, "does nothing at stage 3"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "16-bit values"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "choose none, cpu or nvme"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "needs ZeRO stage 3, not 2"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "without nvme_path"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/mnt", "pipeline_read": True},
                }
            },
            "buffer_count is 4, with which",
        ),
        ({"zero_optimization": [1]}, "zero_optimization is [1]; give an object"),
        ({"zero_optimization": None}, "zero_optimization is None; give an object"),
        ({**BASE, "optimizer": []}, "optimizer is []; give an object"),
        ({**BASE, "optimizer": {"params": []}}, "optimizer.params is []; give an object"),
        ({**BASE, "activation_checkpointing": "layer"}, "activation_checkpointing is 'layer'; give an object"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer is 'cpu'; give an object"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e7"}}, "give a whole number of at least 1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size is 0; give a whole number"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 0.5}}, "sub_group_size is 0.5; give a whole number"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "false"}}, "overlap_comm is 'false'; write true or false"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memroy": True}}},
            "'zero_optimization.offload_optimizer.pin_memroy'; did you mean 'pin_memory'",
        ),
        ({**BASE, "aio": {"queue_dept": 8}}, "'aio.queue_dept'; did you mean 'queue_depth'"),
        ({**BASE, "optimizer": {"momentum": 0.9}}, "unknown key 'optimizer.momentum'"),
        ({**BASE, "optimizer": {"params": {"momentum": 0.9}}}, "unknown key 'optimizer.params.momentum'"),
        ({**BASE, "communication_data_type": "fp16"}, "communication_data_type is 'fp16'; tbf trains in FP32"),
        ({**BASE, "data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype is 'bf16'; tbf trains in FP32"),
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


def test_checkpointing_is_off_without_its_block(resolve):
    assert resolve(BASE)[0].checkpointing == ActivationCheckpointing("none", on_host=False)
    block = {"granularity": "loop", "cpu_checkpointing": True, "number_checkpoints": None}
    engine, _ = resolve({**BASE, "activation_checkpointing": block})
    assert engine.checkpointing == ActivationCheckpointing("loop", on_host=True)
    assert engine.config["activation_checkpointing"] == block  # DeepSpeed looks at its own keys only


def test_the_keys_we_know_are_deepspeeds():
    """Fails when a DeepSpeed release drops or adds a key of ZeRO."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    fields -= {"stage3_gather_fp16_weights_on_model_save"}  # an old name of another key
    assert fields == ds_keys.ZERO | ds_keys.ZERO_BELOW_3 | ds_keys.ZERO_3 | set(ds_keys.ZERO_REFUSED)
    assert set(get_aio_config({})) == ds_keys.AIO
    assert set(DeepSpeedZeroOffloadParamConfig.model_fields) == ds_keys.OFFLOAD["offload_param"]
    ours = ds_keys.OFFLOAD["offload_optimizer"] | set(ds_keys.OFFLOAD_REFUSED)
    assert set(DeepSpeedZeroOffloadOptimizerConfig.model_fields) == ours


def test_every_kind_of_value_belongs_to_a_known_key():
    inside = ds_keys.AIO | ds_keys.OPTIMIZER_PARAMS | {"cpu_checkpointing"} | set().union(*ds_keys.OFFLOAD.values())
    known = inside | ds_keys.TOP | ds_keys.ZERO | ds_keys.ZERO_BELOW_3 | ds_keys.ZERO_3
    assert ds_values.SWITCHES | set(ds_values.AT_LEAST) <= known


def test_offload_with_torch_adam_needs_no_compiled_operator(resolve):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert resolve({"zero_optimization": zero})[0].needs_cpu_adam
    assert not resolve({"zero_optimization": zero, "optimizer": {"params": {"torch_adam": True}}})[0].needs_cpu_adam
    assert not resolve(BASE)[0].needs_cpu_adam
