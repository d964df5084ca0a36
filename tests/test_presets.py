"""What the shipped presets promise: sizes, work per token, and what they share."""

from __future__ import annotations

import pytest

from tbf.config import load_run_config, preset_names
from tbf.model.config import UltraConfig
from tbf.model.encoder import MINI_SHAPE
from tbf.model.flops import build_meta, forward_flops_per_token, parameters_by_part

SPANISH = 50_000


def full_vocabulary(preset: str) -> UltraConfig:
    return load_run_config(preset).model.replace(vocab_size=SPANISH)


def work(preset: str, seq_len: int = 512) -> float:
    return sum(forward_flops_per_token(full_vocabulary(preset), seq_len).values())


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("mini", 14.37),
        ("mini_moe", 17.91),
        ("bert_control", 14.39),
        ("frankenstein_1024", 120.66),
        ("frankenstein_2048", 453.94),
        ("frankenstein_2048_moe", 1058.09),
    ],
)
def test_presets_have_their_documented_sizes(preset, millions):
    config = full_vocabulary(preset)
    model = build_meta(config)
    assert model.num_parameters() == pytest.approx(millions * 1e6, abs=5e3)
    assert sum(parameters_by_part(config).values()) == model.num_parameters()


def test_every_shipped_preset_is_measured_here():
    measured = {case[0] for case in test_presets_have_their_documented_sizes.pytestmark[0].args[1]}
    assert measured == set(preset_names())


@pytest.mark.parametrize(("experts", "dense"), [("mini_moe", "mini"), ("frankenstein_2048_moe", "frankenstein_2048")])
def test_expert_presets_do_the_work_of_their_dense_twin(experts, dense):
    ours, theirs = full_vocabulary(experts), full_vocabulary(dense)
    assert ours.replace(use_moe=False, num_experts=4, ffn_hidden_size=None) == theirs
    assert work(experts) == pytest.approx(work(dense), rel=0.002)


def test_the_control_matches_mini_except_for_what_it_controls():
    mini, control = load_run_config("mini"), load_run_config("bert_control")
    assert control.train == mini.train and control.data == mini.data
    assert control.model.hidden_size == mini.model.hidden_size and control.model.num_layers == mini.model.num_layers
    sizes = [build_meta(run.model.replace(vocab_size=SPANISH)).num_parameters() for run in (control, mini)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert {name for name, _ in control.model.layer_types} == {"standard_attn"} and control.model.num_loops == 1
    assert not control.model.use_bitnet


def test_the_mini_class_is_the_mini_preset():
    assert UltraConfig(**MINI_SHAPE) == load_run_config("mini").model


def test_full_presets_have_the_neural_memory():
    remembering = {p for p in preset_names() if parameters_by_part(full_vocabulary(p)).get("titan_attn")}
    for preset in remembering:
        assert (load_run_config(preset).model.titan_memory == "linear") == preset.startswith("frankenstein"), preset
