"""Tiny models shared by the model tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein

MIXER_CASES = {
    "retnet": {"layer_pattern": ["retnet"]},
    "mamba": {"layer_pattern": ["mamba"]},
    "titan": {"layer_pattern": ["titan_attn"]},
    "titan_local": {"layer_pattern": ["titan_attn:local"]},
    "titan_rope": {"layer_pattern": ["titan_attn"], "use_hope": False},
    "titan_memory": {"layer_pattern": ["titan_attn"], "titan_memory": "linear"},
    "ode": {"layer_pattern": ["ode"]},
    "ode_euler": {"layer_pattern": ["ode"], "ode_solver": "euler", "ode_steps": 2},
    "softmax": {"layer_pattern": ["standard_attn"]},
    "softmax_local": {"layer_pattern": ["standard_attn:local"]},
    "sigmoid": {"layer_pattern": ["sigmoid_attn"]},
    "sigmoid_local": {"layer_pattern": ["sigmoid_attn:local"]},
}
ALL_MIXERS = {
    "layer_pattern": ["retnet", "titan_attn", "mamba", "ode", "standard_attn:local", "sigmoid_attn"],
    "num_layers": 6,
    "titan_memory": "linear",
}


def tiny_config(**changes: object) -> UltraConfig:
    shape = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_layers": 1,
        "num_loops": 1,
        "num_heads": 4,
        "retention_heads": 4,
        "factorized_embedding_dim": 16,
        "mamba_head_dim": 16,
        "mamba_state_size": 8,
        "titan_memory": "none",
        "titan_chunk_size": 4,
        "window": 4,
        "use_bitnet": False,
    }
    return UltraConfig(**{**shape, **changes})


@pytest.fixture
def tiny() -> Callable[..., UltraConfig]:
    """Makes a tiny config in full precision; keyword arguments change its fields."""
    return tiny_config


@pytest.fixture(params=[*MIXER_CASES, "all"])
def mixed(request: pytest.FixtureRequest) -> UltraConfig:
    """One config per mixer and variant, then one with all mixers and two loops."""
    if request.param == "all":
        return tiny_config(num_loops=2, **ALL_MIXERS)
    return tiny_config(**MIXER_CASES[request.param])


@pytest.fixture(params=list(MIXER_CASES))
def one_mixer(request: pytest.FixtureRequest) -> UltraConfig:
    """One config per mixer and variant."""
    return tiny_config(**MIXER_CASES[request.param])


@pytest.fixture
def all_mixers() -> UltraConfig:
    """Six layers, one of each mixer, two loops."""
    return tiny_config(num_loops=2, **ALL_MIXERS)


@pytest.fixture
def lively() -> Callable[..., TormentedBertFrankenstein]:
    """Builds a model whose every parameter is moved off its neutral start, so that each path acts."""

    def build(config: UltraConfig, seed: int = 0) -> TormentedBertFrankenstein:
        torch.manual_seed(seed)
        model = TormentedBertFrankenstein(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return build


@pytest.fixture
def token_ids() -> Callable[..., Tensor]:
    """Draws ordinary token ids of a shape."""

    def draw(*shape: int, seed: int = 1) -> Tensor:
        return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))

    return draw
