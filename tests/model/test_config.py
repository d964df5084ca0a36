"""Impossible model shapes are refused in one line that names the field, the value and a valid one."""

import json

import pytest

from tbf.errors import ConfigError
from tbf.model.config import UltraConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 100, "num_heads": 16}, ["num_heads is 16", "hidden_size 100", "num_heads="]),
        ({"hidden_size": 48, "num_heads": 16, "retention_heads": 8}, ["num_heads is 16", "even"]),
        ({"hidden_size": 33}, ["33", "even"]),
        ({"retention_heads": 3}, ["retention_heads is 3"]),
        ({"mamba_head_dim": 60}, ["mamba_head_dim is 60", "4096"]),
        ({"layer_pattern": ["retnt"]}, ["retnt", "retnet"]),
        ({"layer_pattern": []}, ["layer_pattern is empty"]),
        ({"layer_pattern": "retnet"}, ["retnet", "list"]),
        ({"layer_pattern": ["mamba:local"], "window": 8}, ["mamba:local", "standard_attn"]),
        ({"layer_pattern": ["ode:global"]}, ["ode:global", "ode:local"]),
        ({"layer_pattern": ["ode:local"]}, ["ode:local", "window is 0"]),
        ({"num_experts": 2, "top_k_experts": 3}, ["top_k_experts is 3", "2"]),
        ({"norm_type": "batch"}, ["norm_type is 'batch'", "rms"]),
        ({"ffn_activation": "tanh"}, ["ffn_activation is 'tanh'", "relu2"]),
        ({"ode_solver": "dopri5"}, ["ode_solver is 'dopri5'", "rk4"]),
        ({"dropout": 1.0}, ["dropout is 1.0"]),
        ({"num_loops": 0}, ["num_loops is 0"]),
        ({"num_layers": True}, ["num_layers is True"]),
        ({"num_layers": 2.5}, ["num_layers is 2.5"]),
        ({"embedding_conv_kernel": 4}, ["embedding_conv_kernel is 4", "5"]),
        ({"ffn_hidden_size": 0}, ["ffn_hidden_size is 0"]),
        ({"mask_token_id": 50_000}, ["mask_token_id is 50000", "vocab_size"]),
        ({"mask_token_id": -1}, ["mask_token_id is -1", "4"]),
        ({"hope_damping": 0.0}, ["hope_damping is 0.0", "above 0", "0.01"]),
        ({"hope_base": 1.0}, ["hope_base is 1.0", "above 1", "10000"]),
        ({"rope_base": float("inf")}, ["rope_base is inf", "10000"]),
        ({"norm_eps": float("nan")}, ["norm_eps is nan", "1e-06"]),
        ({"initializer_std": "small"}, ["initializer_std is 'small'", "0.02"]),
        ({"dropout": -0.1}, ["dropout is -0.1", "at least 0"]),
        ({"router_bias_rate": -1e-3}, ["router_bias_rate is -0.001", "0.001"]),
        ({"window": -2}, ["window is -2", "whole number"]),
        ({"window": 64.0}, ["window is 64.0", "whole number"]),
        ({"ffn_hidden_size": 2.5}, ["ffn_hidden_size is 2.5", "null"]),
        ({"use_moe": "yes"}, ["use_moe is 'yes'", "true or false"]),
        ({"num_experts": 0}, ["num_experts is 0", "at least 1"]),
        ({"top_k_experts": 0}, ["top_k_experts is 0", "at least 1"]),
        ({"layer_pattern": 3}, ["layer_pattern is 3", "[retnet, mamba]"]),
        ({"layer_pattern": [3]}, ["'3'", "retnet"]),
        ({"layer_pattern": ["retnet:local"], "window": 8}, ["retnet:local", "titan_attn"]),
        ({"titan_memory": "deep"}, ["titan_memory is 'deep'", "linear"]),
        ({"titan_chunk_size": 0}, ["titan_chunk_size is 0"]),
        (
            {"hidden_size": 96, "num_heads": 32, "retention_heads": 8, "mamba_head_dim": 32},
            ["num_heads is 32", "even", "num_heads=24"],
        ),
    ],
)
def test_impossible_shapes(changes, words):
    with pytest.raises(ConfigError) as error:
        UltraConfig(**changes)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="'hiden_size'; did you mean 'hidden_size'"):
        UltraConfig.from_dict({"hiden_size": 4})


def test_pattern_cycles_over_layers():
    config = UltraConfig(layer_pattern=["retnet", "ode:local"], num_layers=5, window=64)
    assert config.layer_types == (("retnet", 0), ("ode", 64), ("retnet", 0), ("ode", 64), ("retnet", 0))


def test_derived_sizes():
    config = UltraConfig()
    assert (config.head_dim, config.retention_head_dim, config.mamba_heads) == (128, 256, 64)
    assert (config.ffn_size, config.embedding_size, config.padded_vocab_size) == (4096, 256, 50_048)
    assert UltraConfig(vocab_size=64).padded_vocab_size == 64
    assert UltraConfig(use_factorized_embedding=False).embedding_size == 2048
    assert UltraConfig(ffn_hidden_size=100).ffn_size == 100


def test_config_survives_json(tmp_path):
    config = UltraConfig(layer_pattern=["mamba", "retnet"], ffn_hidden_size=512)
    config.save(tmp_path / "config.json")
    assert UltraConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config
