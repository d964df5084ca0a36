from __future__ import annotations

import pytest

from tbf.model.config import UltraConfig
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
