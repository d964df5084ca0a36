from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tbf.errors import ConfigError
from tbf.export.hf import write_card
from tbf.export.plain import export_run, load_pretrained
from tests.export.tiny_runs import tiny_config, tiny_tokenizer

FACTS = {
    "run": "es-2048",
    "parameters": 451_915_472,
    "step": 12_000,
    "tokens": 3_000_000_000,
    "train_loss": 2.5,
    "val_loss": 2.25,
    "data": {"source": "hf:name|odd`one", "seq_len": 512, "mask_rate": 0.3},
    "hardware": {"gpus": ["Tesla P40", "Tesla P40"], "cpu_cores": 32, "host_memory_gb": 128.0},
    "engine": {"zero_stage": 2, "world_size": 2, "deepspeed": "0.19.8"},
    "tbf_version": "0.1.0",
    "verified": {"logits_max_abs_error": 0.0},
}


def card(folder: Path, facts: dict, license: str | None = None) -> str:
    write_card(folder, facts, tiny_config(tiny_tokenizer()), license)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_export_of_a_run(runs: dict, tmp_path: Path) -> None:
    source, live = runs["zero2"]
    run_dir = Path(shutil.copytree(source, tmp_path / "run"))
    (run_dir / "environment.json").write_text(json.dumps([{}, FACTS["hardware"]]))
    out = export_run(run_dir, tmp_path / "out", format="hf", step="best", verify=False, license="cc-by-4.0")
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json", "export.json", "README.md",
        "modules.json", "sentence_bert_config.json", "1_Pooling/config.json",
    }  # fmt: skip
    model, tokenizer = load_pretrained(out)
    assert all((value == live[2][name]).all() for name, value in model.state_dict().items())
    assert tokenizer is not None
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("tbf", ["TbfForMaskedLM"])
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "license: cc-by-4.0" in text
    assert "| validation loss | 1.500 nats per masked token |" in text
    assert "2x Tesla P40" in text


def test_the_card_says_what_the_run_was(tmp_path: Path) -> None:
    text = card(tmp_path, FACTS, "apache-2.0")
    for part in (
        "# es-2048", "451,915,472", "12,000", "3,000,000,000", "2.250", "512", "30%", "`hf:name/odd'one`",
        "2x Tesla P40; 32 CPU cores, 128.0 GB", "DeepSpeed 0.19.8, ZeRO-2, 2 rank(s)", "differ by at most 0e+00",
        "| licence | apache-2.0 |",
    ):  # fmt: skip
        assert part in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in table)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    unknown = {"run": None, "tokens": None, "train_loss": None, "val_loss": None, "hardware": None, "data": {}}
    text = card(tmp_path, {**FACTS, **unknown, "verified": None})
    assert "None" not in text
    assert not re.search(r"loss|hardware|tokens seen", text)
    assert "license:" not in text
    assert "not stated" in text
    assert "| conversion | not verified |" in text


def test_a_licence_is_an_identifier(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no identifier"):
        export_run(tmp_path, tmp_path / "out", format="hf", license="MIT\nevil: yes")
