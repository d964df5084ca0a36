from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tbf.errors import CheckpointError
from tbf.export.stored import StoredTensor
from tbf.export.weights import load_strict, read_weights, tied_names, write_weights
from tests.export.toy import ToyNet

TENSORS = {
    "matrix": torch.randn(3, 5),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(4),
    "empty": torch.empty(0, 3),
    "half": torch.randn(3).bfloat16(),
    "transposed": torch.randn(4, 3).t(),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(value.shape, value.dtype, value.contiguous) for name, value in tensors.items()}


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_round_trip_of_every_kind_of_tensor(tmp_path: Path, format: str) -> None:
    write_weights(tmp_path, stored(TENSORS), format)
    loaded = read_weights(tmp_path)
    assert loaded.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert torch.equal(loaded[name], value)


def test_the_safetensors_library_accepts_the_file(tmp_path: Path) -> None:
    write_weights(tmp_path, stored(TENSORS), "safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == TENSORS.keys()


def test_large_weights_are_cut_into_files(tmp_path: Path) -> None:
    many = {f"t{i}": torch.randn(10) for i in range(7)} | {"huge": torch.randn(100), "byte": torch.ones(1).byte()}
    write_weights(tmp_path, stored(many), "safetensors", shard_bytes=100)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in many.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as content:
            assert torch.equal(content.get_tensor(name), many[name])
    loaded = read_weights(tmp_path)
    assert loaded.keys() == many.keys()
    assert all(torch.equal(value, many[name]) for name, value in loaded.items())
    (tmp_path / files[2]).unlink()
    with pytest.raises(CheckpointError, match=f"names '{files[2]}'"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["{}", "no json", '{"weight_map": {"t": "../model.safetensors"}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_weights(tmp_path)


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def read() -> torch.Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.zeros(8).as_subclass(Counted)

    many = {f"t{i}": StoredTensor(torch.Size([8]), torch.float32, read) for i in range(20)}
    write_weights(tmp_path, many, "safetensors")
    assert most <= 3


def test_ties_are_restored_and_named() -> None:
    net, other = ToyNet(), ToyNet()
    assert tied_names(net) == {"head.weight": "table.weight"}
    weights = {name: value for name, value in other.state_dict().items() if name != "head.weight"}
    load_strict(net, weights, Path("x"))
    assert torch.equal(net.head.weight, other.table.weight)
    assert net.head.weight is net.table.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("up.bias"), "'up.bias' is missing"),
        (lambda w: w.update(more=torch.zeros(1)), "'more' is not in the model"),
        (lambda w: w.update({"up.bias": torch.zeros(1)}), r"'up.bias' is \[1\], the model's is \[7\]"),
        (lambda w: w.pop("mean"), "'mean' is missing"),
    ],
)
def test_loading_is_strict(change: object, message: str) -> None:
    weights = {name: value for name, value in ToyNet().state_dict().items() if name != "head.weight"}
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        load_strict(ToyNet(), weights, Path("x"))


def test_a_failed_load_changes_nothing() -> None:
    net = nn.Linear(2, 2)
    before = net.weight.detach().clone()
    with pytest.raises(CheckpointError):
        load_strict(net, {"weight": torch.ones(2, 2), "bias": torch.ones(3)}, Path("x"))
    assert torch.equal(net.weight, before)
