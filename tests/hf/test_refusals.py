"""transformers, too, runs nothing that stands in place of weights."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import tbf.hf  # noqa: F401
from tests.test_cli_evaluate import Touch


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_in_place_of_weights_is_never_run(exported: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    evil = Touch(tmp_path / "touched")
    if zipped:
        torch.save({"tbf.x": evil}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(evil))
    with pytest.raises(Exception):  # noqa: B017 (transformers' own, whatever they are)
        AutoModel.from_pretrained(folder)
    assert not (tmp_path / "touched").exists()
