"""A file that would run code when it is loaded is refused in every place where tbf loads one."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tbf.checkpoints.files import hash_file
from tbf.checkpoints.manifest import Manifest
from tbf.config import RunConfig, load_run_config
from tbf.data.loader import PackedDataset
from tbf.data.shards import ShardIndex
from tbf.data.tokenizer import MODEL_FILE, SpanishSPMTokenizer
from tbf.errors import CheckpointError, ConfigError, DataError
from tbf.export.source import read_config
from tbf.train.checkpoint import CheckpointStore
from tbf.train.deepspeed_io import durable_io
from tbf.train.ds_config import load_ds_config
from tbf.train.rng import load_rng
from tbf.train.run_folder import choose_run_dir
from tests.helpers.fake_engine import FakeEngine

YAML_ATTACK = "model: !!python/object/apply:os.mkdir [owned]\ndata: {}\ntrain: {seed: 0}\n"


class Attack:
    """Makes a folder in the working directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Attack()))  # the attack itself works
    assert (tmp_path / "owned").exists()


def saved(root: Path) -> Path:
    return CheckpointStore(root / "checkpoints").save(FakeEngine(), 1, {"step": 1}, 0, 1)


def vouch_for(folder: Path) -> None:
    """Writes a manifest that fits the files as they are: whoever can change those can change this."""
    manifest = Manifest.read(folder)
    files = {name: hash_file(folder / name) for name in manifest.files}
    dataclasses.replace(manifest, files=files).write(folder)


FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_rank0.pt")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_files(tmp_path, name, zipped):
    folder = saved(tmp_path)
    torch.save({"module": Attack()}, folder / name) if zipped else (folder / name).write_bytes(pickle.dumps(Attack()))
    vouch_for(folder)
    with pytest.raises(CheckpointError, match="is damaged"):
        CheckpointStore(tmp_path / "checkpoints").load(FakeEngine(), folder, 0, 1)


def test_client_state(tmp_path):
    folder = saved(tmp_path)
    content = torch.load(folder / FILES[0], weights_only=True)
    torch.save({**content, "tbf": {"step": 1, "more": Attack()}}, folder / FILES[0])
    vouch_for(folder)
    with pytest.raises(CheckpointError, match="would run"):
        CheckpointStore(tmp_path / "checkpoints").load(FakeEngine(), folder, 0, 1)


@pytest.mark.parametrize("name", FILES)
def test_the_loaders_refuse_by_themselves(tmp_path, name):
    """Without the look at a file that comes before."""
    torch.save({"module": Attack(), "torch": Attack()}, tmp_path / name)
    engine = FakeEngine()
    with durable_io(engine) as io, pytest.raises(CheckpointError, match="is refused"):
        io.load(str(tmp_path / name))
    with pytest.raises(pickle.UnpicklingError):
        load_rng(tmp_path / name)


def test_the_trainers_state(tmp_path):
    folder = saved(tmp_path)
    (folder / "trainer_state.json").write_bytes(pickle.dumps(Attack()))
    vouch_for(folder)
    with pytest.raises(CheckpointError, match="no JSON"):
        CheckpointStore(tmp_path / "checkpoints").load(FakeEngine(), folder, 0, 1)


@pytest.mark.parametrize("content", [YAML_ATTACK.encode(), pickle.dumps(Attack())])
def test_presets_and_the_configuration_of_a_run(tmp_path, content):
    (tmp_path / "preset.yaml").write_bytes(content)
    with pytest.raises(ConfigError):
        load_run_config(str(tmp_path / "preset.yaml"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError)):
        choose_run_dir(str(run), "auto", RunConfig())
    with pytest.raises((CheckpointError, ConfigError)):
        read_config(run / "config.yaml")


def test_overrides():
    with pytest.raises(ConfigError):
        load_run_config("mini", ["model.hidden_size=!!python/object/apply:os.mkdir [owned]"])


def test_the_engines_configuration(tmp_path):
    (tmp_path / "ds.json").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ConfigError):
        load_ds_config(tmp_path / "ds.json", RunConfig(), 1)


def test_tokenizers(tmp_path):
    (tmp_path / MODEL_FILE).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError):
        SpanishSPMTokenizer.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from tbf.data.packing import build_rows
    from tbf.data.plan import PrepareOptions
    from tbf.data.sharding import prepare
    from tbf.data.sources import open_source

    folder = tmp_path_factory.mktemp("shards")
    tokenizer = SpanishSPMTokenizer.train(open_source("sample"), 400)
    prepare("sample", tokenizer, folder, PrepareOptions(progress=False))
    build_rows(ShardIndex.read(folder), 32, 0.1)
    return folder


def test_every_file_of_the_shards(tmp_path, prepared):
    """Arrays of numbers cannot run anything; all else names what is wrong. Whatever is raised is an error of ours."""
    names = [path.relative_to(prepared) for path in sorted(prepared.rglob("*")) if path.is_file()]
    names = [name for name in names if not name.name.endswith(".lock")]
    assert len(names) >= 8
    refused = []
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(prepared, folder)
        (folder / name).write_bytes(pickle.dumps(Attack()))
        try:
            for split in ("train", "validation"):
                PackedDataset(folder, split=split, seq_len=32, seed=0, validation_share=0.1).row(0)
            SpanishSPMTokenizer.from_pretrained(folder / "tokenizer")
            ShardIndex.read(folder).verify()
        except DataError:
            refused.append(name.name)
    assert {"index.json", "shard-00000.bin", "shard-00000.idx", MODEL_FILE} <= set(refused)
