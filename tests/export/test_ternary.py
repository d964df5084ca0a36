from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tbf.errors import CheckpointError, ConfigError
from tbf.export.plain import build_without_drawing, export_run, load_pretrained
from tbf.export.stored import StoredTensor
from tbf.export.ternary import packed_slices, packed_tensors, size_report
from tbf.export.weights import read_weights, write_weights
from tbf.model.encoder import TormentedBertFrankenstein
from tests.export.tiny_runs import TEXT, tiny_config, tiny_tokenizer
from tests.model.test_fast import needs_fast

MOE = {"use_moe": True, "num_experts": 3, "ffn_activation": "swiglu"}


def stored(weights: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(value.shape, value.dtype, value.clone) for name, value in weights.items()}


def write_packed(folder: Path, model: TormentedBertFrankenstein) -> Path:
    """A ternary export without a tokenizer."""
    folder.mkdir()
    write_weights(folder, packed_tensors(stored(model.state_dict()), packed_slices(model)), "ternary")
    model.config.save(folder / "config.json")
    return folder


@pytest.fixture(params=[{}, MOE], ids=["dense", "experts"])
def model(request: pytest.FixtureRequest) -> TormentedBertFrankenstein:
    torch.manual_seed(1)
    return TormentedBertFrankenstein(tiny_config(tiny_tokenizer(), **request.param)).eval()


def logits(model: TormentedBertFrankenstein) -> torch.Tensor:
    ids = tiny_tokenizer().encode(TEXT, return_tensors="pt")
    with torch.no_grad():
        return model.predict(model(**ids).last_hidden_state)


def test_logits_are_the_models_own(model: TormentedBertFrankenstein, tmp_path: Path) -> None:
    packed, tokenizer = load_pretrained(write_packed(tmp_path / "packed", model))
    assert tokenizer is None
    assert not packed.training
    assert torch.equal(logits(packed), logits(model))
    assert not {name for name, _ in packed.named_parameters()} & packed_slices(model).keys()


@needs_fast
def test_the_fast_model_is_close(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = TormentedBertFrankenstein(tiny_config(tiny_tokenizer())).eval()
    packed, _ = load_pretrained(write_packed(tmp_path / "packed", model), fast=True)
    assert packed.fast is not None
    assert (logits(packed) - logits(model))[:, :-1].abs().quantile(0.5) < 1e-3 * logits(model).abs().max()


def test_loading_and_saving_again_changes_no_byte(model: TormentedBertFrankenstein, tmp_path: Path) -> None:
    first = write_packed(tmp_path / "first", model)
    packed, _ = load_pretrained(first)
    logits(packed)
    second = tmp_path / "second"
    second.mkdir()
    write_weights(second, stored(packed.state_dict()), "ternary")
    model.config.save(second / "config.json")
    files = [folder / "model.ternary.safetensors" for folder in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(logits(load_pretrained(second)[0]), logits(model))


def test_export_of_a_run(runs: dict, tmp_path: Path) -> None:
    run_dir, live = runs["zero3"]
    out = export_run(run_dir, tmp_path / "out", format="ternary")
    files = {"model.ternary.safetensors", "config.json", "export.json", "tokenizer.model", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == files
    packed, tokenizer = load_pretrained(out)
    trained = TormentedBertFrankenstein(packed.config).eval()
    trained.load_state_dict(live[4])
    assert torch.equal(logits(packed), logits(trained))
    assert tokenizer.vocab_size == packed.config.vocab_size
    facts = json.loads((out / "export.json").read_text())
    assert facts["verified"]["logits_max_abs_error"] == facts["verified"]["tolerance"] == 0.0
    assert facts["verified"]["tensors_equal"] == len(packed.state_dict())
    assert facts["parameters"] == sum(value.numel() for value in live[4].values())
    weights = read_weights(out)
    kept = sum(value.nbytes for name, value in weights.items() if name.endswith((".trits", ".scales")))
    slices = packed_slices(trained)
    assert facts["ternary"]["weights"] == sum(live[4][name].numel() for name in slices)
    assert facts["ternary"]["bytes"] == kept
    assert facts["weight_bytes"] == sum(value.nbytes for value in weights.values())


def test_a_wide_layer_takes_a_fifth_of_a_byte_per_weight() -> None:
    tensor = StoredTensor(torch.Size([8192, 2048]), torch.float32, lambda: pytest.fail("sizes need no weights"))
    report = size_report({"up.weight": tensor}, {"up.weight": (8192,)})
    assert report == {"weights": 8192 * 2048, "bytes": 8192 * 410 + 4, "bytes_per_weight": 0.200196}


def test_verification_notices_other_scales(runs: dict, tmp_path: Path) -> None:
    """Masters half as large again have the same ternary values, with other scales."""
    run = Path(shutil.copytree(runs["zero2"][0] / "checkpoints" / "step-00000004", tmp_path / "step"))
    (run / "manifest.json").unlink()
    (shard,) = run.glob("*_optim_states.pt")
    content = torch.load(shard, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data.mul_(1.5)
    torch.save(content, shard)
    settings = {"config": runs["zero2"][0] / "config.yaml", "format": "ternary"}
    with pytest.raises(CheckpointError, match="differs by"):
        export_run(run, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_model_without_ternary_weights_is_refused(tmp_path: Path) -> None:
    plain = TormentedBertFrankenstein(tiny_config(tiny_tokenizer(), use_bitnet=False))
    with pytest.raises(ConfigError, match="no ternary weights"):
        packed_tensors(stored(plain.state_dict()), packed_slices(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, name: w.pop(f"{name}.scales"), "scales' is missing"),
        (lambda w, name: w.update({f"{name}.trits": w[f"{name}.trits"][:, :-1].clone()}), "trits' is"),
        (lambda w, name: w.update({f"{name}.trits": w[f"{name}.trits"].float()}), r"trits' is torch\.float32"),
    ],
)
def test_damaged_exports_are_refused(tmp_path: Path, change: object, message: str) -> None:
    model = TormentedBertFrankenstein(tiny_config(tiny_tokenizer()))
    folder = write_packed(tmp_path / "packed", model)
    weights = {name: value.clone() for name, value in read_weights(folder).items()}
    change(weights, "layers.0.ffn.up_proj")
    write_weights(folder, stored(weights), "ternary")
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def test_packed_models_are_built_without_drawing() -> None:
    state = torch.random.get_rng_state()
    packed = build_without_drawing(tiny_config(tiny_tokenizer()), packed=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert any(name.endswith(".trits") for name in packed.state_dict())
