from __future__ import annotations

import pytest
import yaml

from tbf.config import RunConfig, load_run_config, preset_names
from tbf.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(name, tmp_path):
    run = load_run_config(name)
    path = tmp_path / "config.yaml"
    run.save(path)
    again = load_run_config(str(path))
    assert again.model == run.model and again.train == run.train
    assert again.data.seq_len == run.data.seq_len and again.preset == name


def test_overrides_win_and_keep_their_type():
    run = load_run_config("mini", ["train.learning_rate=2e-3", "model.num_loops=3", "train.wandb=true"])
    assert (run.train.learning_rate, run.model.num_loops, run.train.wandb) == (2e-3, 3, True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_step=5", "did you mean 'max_steps'"),
        ("trian.max_steps=5", "did you mean 'train'"),
        ("train.max_steps", "section.key=value"),
        ("train.max_steps=many", "expected a whole number"),
        ("train.max_steps=true", "expected a whole number"),
        ("train.learning_rate=fast", "expected a number"),
        ("train.wandb=1", "expected true or false"),
        ("train.keep_last=1", "at least 2"),
        ("data.mask_rate=1.5", "between 0 and 1"),
        ("data.mask_token_share=0.95", "at most 1"),
        ("data.source=", "expected text"),
        ("model.num_heads=7", "num_heads=6"),
        ("model.norm_type=rsm", "choose one of"),
        ("model.layer_pattern=retnet", "expected a list"),
        ("model.layer_pattern=[retnett]", "did you mean 'retnet'"),
        ("model.layer_pattern=['mamba:local']", "can be local"),
        ("model.layer_pattern=['titan_attn:local']", "set e.g. window"),
        ("model.embedding_conv_kernel=4", "odd width"),
        ("model.top_k_experts=9", "at most num_experts"),
        ("model.mamba_head_dim=100", "must divide"),
        ("model.hidden_size=0", "at least 1"),
    ],
)
def test_wrong_overrides_name_the_cure(override, words):
    with pytest.raises(ConfigError, match=None) as caught:
        load_run_config("mini", [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "expected the sections"),
        ("modle: {}", "did you mean 'model'"),
        ("model: 3", "expected keys and values"),
        ("train: {max_stepz: 3}", "did you mean 'max_steps'"),
        ("model: {vocab_size: 100}\ndata: {vocab_size: 200}", "contradicts"),
    ],
)
def test_wrong_preset_files_name_the_place(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path))
    assert words in str(caught.value) and "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_presets_name_the_nearest_and_the_file(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        load_run_config("minni")
    with pytest.raises(ConfigError, match="cannot read preset file"):
        load_run_config(str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"model: {a: \xf1}")
    with pytest.raises(ConfigError, match="cannot read preset file"):
        load_run_config(str(tmp_path / "latin.yaml"))


def test_the_fingerprint_follows_the_architecture_and_the_data_but_not_the_length():
    run = load_run_config("mini")
    assert run.fingerprint() == run.replace(train={"max_steps": 7}).fingerprint()
    assert run.fingerprint() != run.replace(model={"num_loops": 3}).fingerprint()
    for key, value in {"seq_len": 64, "whole_words": True, "mask_rate_end": 0.1, "random_token_share": 0.0,
                       "column": "body", "min_spanish": 0.5, "validation_share": 0.1}.items():  # fmt: skip
        assert run.fingerprint() != run.replace(data={key: value}).fingerprint(), key
    assert run.fingerprint("one corpus") != run.fingerprint("another")
    assert run.fingerprint() == run.replace(data={"num_workers": 3, "cache_dir": "/mnt/ramdisk"}).fingerprint()


def test_a_saved_config_states_every_key(tmp_path):
    RunConfig().save(tmp_path / "c.yaml")
    saved = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert set(saved) == {"preset", "model", "data", "train"} and saved["model"]["hidden_size"] == 2048
