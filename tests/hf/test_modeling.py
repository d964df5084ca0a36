from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

import tbf.hf
from tbf.errors import CheckpointError, ConfigError
from tbf.evaluate.fill_mask import fill_mask
from tbf.export.plain import load_pretrained
from tests.export.tiny_runs import TEXT, tiny_config, tiny_tokenizer

CLASSES = (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)


@pytest.fixture(scope="module")
def batch(exported: Path) -> dict[str, torch.Tensor]:
    return dict(AutoTokenizer.from_pretrained(exported)(TEXT, padding=True, return_tensors="pt"))


def test_auto_classes_compute_what_the_plain_model_does(exported: Path, batch: dict) -> None:
    plain, _ = load_pretrained(exported)
    with torch.no_grad():
        expected = plain(**batch)
        encoded = AutoModel.from_pretrained(exported)(**batch)
        logits = AutoModelForMaskedLM.from_pretrained(exported)(**batch).logits
        assert torch.equal(encoded.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(encoded.pooler_output, expected.pooler_output)
        assert torch.equal(logits, plain.predict(expected.last_hidden_state))


def test_the_folder_brings_no_code(exported: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (exported / name).read_text()
    assert not list(exported.rglob("*.py"))


@pytest.mark.parametrize("auto", CLASSES, ids=lambda auto: auto.__name__)
def test_saved_and_loaded_again(exported: Path, batch: dict, auto: type, tmp_path: Path) -> None:
    model = auto.from_pretrained(exported)
    if hasattr(model, "classifier"):
        assert 0 < model.classifier.weight.std() < 0.05
        assert not model.classifier.bias.any()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        for ours, theirs in zip(model(**batch).to_tuple(), again(**batch).to_tuple()):
            assert torch.equal(ours, theirs)


def test_what_transformers_saved_opens_as_a_plain_export(exported: Path, tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_pretrained(exported).save_pretrained(tmp_path)
    ours, theirs = (load_pretrained(folder)[0] for folder in (exported, tmp_path))
    assert ours.config == theirs.config
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    AutoModelForTokenClassification.from_pretrained(exported).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="not in the model"):
        load_pretrained(tmp_path / "other")


def test_configuration_keeps_every_field(tmp_path: Path) -> None:
    ultra = tiny_config(tiny_tokenizer(), window=8, pooling="cls", layer_pattern=["titan_attn:local", "ode"])
    config = tbf.hf.TbfConfig(**ultra.to_dict(), id2label={0: "no", 1: "sí", 2: "quizá"})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert ultra.to_dict().items() <= saved.items()
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_ultra() == ultra
    assert again.num_labels == 3
    assert (again.num_hidden_layers, again.num_attention_heads) == (ultra.num_layers, ultra.num_heads)
    with pytest.raises(ConfigError, match="num_heads"):
        tbf.hf.TbfConfig(hidden_size=32, num_attention_heads=5)
    with pytest.raises(ConfigError, match="classifier_dropout"):
        tbf.hf.TbfConfig(classifier_dropout=1.5)


def test_a_missing_encoder_weight_is_an_error(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "less"))
    weights = load_file(folder / "model.safetensors")
    del weights["layers.0.ffn.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'tbf\.layers\.0\.ffn\.up_proj\.weight' is missing \(1 "):
        AutoModel.from_pretrained(folder)


def test_masked_lm_loss_is_the_encoders(exported: Path, batch: dict) -> None:
    plain, _ = load_pretrained(exported)
    model = AutoModelForMaskedLM.from_pretrained(exported)
    labels = torch.where(torch.arange(batch["input_ids"].shape[1]) % 5 == 1, batch["input_ids"], -100)
    expected = plain(**batch, labels=labels).loss
    out = model(**batch, labels=labels)
    assert torch.equal(out.loss, expected)
    assert out.logits.shape == (*labels.shape, model.config.vocab_size)
    assert torch.allclose(F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()), expected)
    sparse = model.train()(**batch, labels=labels)
    assert sparse.logits is None
    assert torch.allclose(sparse.loss, expected)
    assert torch.equal(model(**batch, labels=labels, return_dict=False)[0], sparse.loss)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (torch.tensor([0, 2, 1]), "single_label_classification"),
        (torch.tensor([[0.0, 1, 1]] * 3), "multi_label_classification"),
    ],
)
def test_sequence_losses(exported: Path, batch: dict, labels: torch.Tensor, kind: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=3)
    out = model(**batch, labels=labels)
    loss = F.cross_entropy if labels.ndim == 1 else F.binary_cross_entropy_with_logits
    assert model.config.problem_type == kind
    assert torch.allclose(out.loss, loss(out.logits, labels))


def test_token_loss_skips_unlabelled_tokens(exported: Path, batch: dict) -> None:
    model = AutoModelForTokenClassification.from_pretrained(exported, num_labels=4)
    labels = torch.where(batch["input_ids"] > 270, batch["input_ids"] % 4, -100)
    out = model(**batch, labels=labels)
    assert torch.allclose(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


def test_gradient_checkpointing_changes_no_gradient(exported: Path, batch: dict) -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = AutoModelForMaskedLM.from_pretrained(exported).train()
        if recompute:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == recompute
        assert model.tbf.checkpointing == ("layer" if recompute else "none")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_the_vocabulary_is_fixed(exported: Path) -> None:
    model = AutoModel.from_pretrained(exported)
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()
    with pytest.raises(ConfigError, match="is fixed"):
        model.resize_token_embeddings(1000)


def test_fill_mask_pipeline(exported: Path) -> None:
    plain, tokenizer = load_pretrained(exported)
    pipe = pipeline("fill-mask", str(exported))
    text = "La capital de España es [MASK]."
    ours = fill_mask(plain, tokenizer, text, top_k=5)[0]
    theirs = [answer for answer in pipe(text, top_k=10) if answer["token"] > 4][:5]
    assert [answer["token"] for answer in theirs] == [candidate.token_id for candidate in ours]
    assert len(pipe("[MASK] y [MASK]", top_k=2)) == 2


def test_feature_extraction_pipeline(exported: Path, batch: dict) -> None:
    features = pipeline("feature-extraction", str(exported))(TEXT[0], return_tensors=True)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(exported)(**{key: value[:1] for key, value in batch.items()})
    assert torch.allclose(features, expected.last_hidden_state[:, : features.shape[1]], atol=1e-6)
