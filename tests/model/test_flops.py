from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.flops import build_meta, forward_flops_per_token, ode_evaluations, parameters_by_part

SMALL = {"vocab_size": 500, "hidden_size": 64, "num_heads": 4, "retention_heads": 4, "factorized_embedding_dim": 32}


@pytest.mark.parametrize("changes", [{}, {"use_factorized_embedding": False}, {"num_layers": 5, "num_loops": 3}])
def test_the_parts_add_up_to_the_model(changes):
    config = UltraConfig(**{**SMALL, **changes})
    assert sum(parameters_by_part(config).values()) == build_meta(config).num_parameters()


def test_the_operations_of_one_dense_attention_layer_match_a_count_by_hand():
    config = UltraConfig(**SMALL, num_layers=1, num_loops=1, layer_pattern=("standard_attn",), use_embedding_conv=False)
    d, f, t, e = 64, 128, 32, 32
    flops = forward_flops_per_token(config, seq_len=t, masked_share=0.5)
    assert flops["standard_attn"] == 2 * 4 * d * d + 4 * t * d
    assert flops["ffn"] == 2 * 2 * d * f
    assert flops["embeddings"] == 2 * e * d
    assert flops["head"] == pytest.approx(0.5 * 2 * (d * e + 500 * e))


def test_loops_and_ode_stages_multiply_the_work_but_not_the_parameters():
    one, two = (UltraConfig(**SMALL, layer_pattern=("ode",), num_loops=n, ode_steps=n) for n in (1, 2))
    assert ode_evaluations(two) == 2 * ode_evaluations(one)
    first, second = (forward_flops_per_token(c, 64) for c in (one, two))
    assert second["ode"] == pytest.approx(4 * first["ode"], rel=0.01)
    assert second["ffn"] == 2 * first["ffn"]


def test_the_full_model_has_the_published_size():
    """454 M parameters and 2.4 GFLOP a token at 512, by the tables that the design rests on."""
    config = UltraConfig(retention_heads=16)
    assert build_meta(config).num_parameters() == pytest.approx(454e6, rel=0.01)
    assert sum(forward_flops_per_token(config, 512).values()) == pytest.approx(2.38e9, rel=0.05)


@pytest.mark.parametrize("mixer", ["titan_attn", "retnet", "mamba", "ode", "standard_attn"])
def test_operations_agree_with_those_that_torch_counts(mixer):
    """Rows of many chunks, so that nothing is rounded up; layers in floating point, which the counter knows."""
    config = UltraConfig(
        **SMALL, num_layers=1, num_loops=2, layer_pattern=(mixer,), use_bitnet=False, mamba_head_dim=16,
        mamba_state_size=16, titan_chunk_size=16,
    )  # fmt: skip
    model, tokens = TormentedBertFrankenstein(config), 512
    ids = torch.arange(tokens).remainder(400)[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    ours = sum(forward_flops_per_token(config, tokens, masked_share=0.0).values())
    assert ours == pytest.approx(counter.get_total_flops() / tokens, rel=0.02)
