"""Files that survive a crash, the manifest that vouches for them, and the random state beside them."""

import errno
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from tbf.checkpoints import files
from tbf.checkpoints.manifest import MANIFEST_NAME, Manifest, flatten, unsafe_content
from tbf.errors import CheckpointError
from tbf.train.rng import load_rng, rng_bytes

NAMES = ("model.pt", "state.json")


class Attack:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.fixture
def folder(tmp_path):
    records = {"state.json": files.write_durable(tmp_path / "state.json", b'{"a": 1}\n')}
    torch.save({"w": torch.arange(4096.0)}, tmp_path / "model.pt")
    records["model.pt"] = files.hash_file(tmp_path / "model.pt")
    Manifest(
        step=7,
        val_loss=1.25,
        healthy=True,
        world_size=1,
        zero_stage=2,
        optimizer="AdamW",
        layout="abc",
        model={"hidden_size": 8},
        fingerprint="",
        versions={"tbf": "0"},
        saved_at="2026-01-01T00:00:00+00:00",
        files=records,
    ).write(tmp_path)
    return tmp_path


def problems(folder):
    manifest = Manifest.read(folder)
    return manifest.missing_files(folder) + [p for name in manifest.files if (p := manifest.problem_with(folder, name))]


def test_round_trip(folder):
    manifest = Manifest.read(folder)
    assert (manifest.step, manifest.val_loss, manifest.model) == (7, 1.25, {"hidden_size": 8})
    assert manifest.files["state.json"].bytes == 9
    assert manifest.total_bytes == sum((folder / name).stat().st_size for name in NAMES)
    assert problems(folder) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_file_cut_short_anywhere_is_noticed(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    assert any(name in problem and "bytes instead of" in problem for problem in problems(folder))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_flipped_bit_is_noticed(folder, name, share):
    content = bytearray((folder / name).read_bytes())
    content[int(len(content) * share)] ^= 0x10
    (folder / name).write_bytes(content)
    assert any(name in problem for problem in problems(folder))


def test_every_flipped_byte_of_the_manifest_is_noticed(folder):
    path = folder / MANIFEST_NAME
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x01]) + content[position + 1 :])
        with pytest.raises(CheckpointError):
            Manifest.read(folder)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.99])
def test_a_manifest_cut_short_is_noticed(folder, share):
    path = folder / MANIFEST_NAME
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="cut short"):
        Manifest.read(folder)


@pytest.mark.parametrize("text", ["[]", "null", "7", '{"format": 1}', '"x"'])
def test_other_json_is_no_manifest(folder, text):
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="not a manifest"):
        Manifest.read(folder)


def test_missing_manifest_and_missing_file(folder):
    (folder / "model.pt").unlink()
    assert "model.pt is missing" in problems(folder)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Manifest.read(folder)


def rewrite(folder, **changes):
    """Changes a manifest the way someone would who also recomputes its hash."""
    from tbf.checkpoints import manifest as module

    body = {**json.loads((folder / MANIFEST_NAME).read_text()), **changes}
    del body["sha256"]
    (folder / MANIFEST_NAME).write_text(json.dumps({**body, "sha256": module._body_hash(body)}))


def test_names_outside_the_folder_are_refused(folder):
    rewrite(folder, files={"../other.pt": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError, match="outside"):
        Manifest.read(folder)


def test_another_format_names_the_cure(folder):
    rewrite(folder, format=99)
    with pytest.raises(CheckpointError, match="format 99"):
        Manifest.read(folder)


def test_unknown_entries_are_refused(folder):
    rewrite(folder, surprise=1)
    with pytest.raises(CheckpointError, match="unknown"):
        Manifest.read(folder)


def test_a_pickle_that_runs_code_is_refused_even_with_a_matching_hash(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"w": Attack()}, folder / "model.pt")
    record = files.hash_file(folder / "model.pt")
    known = {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in Manifest.read(folder).files.items()}
    rewrite(folder, files={**known, "model.pt": {"bytes": record.bytes, "sha256": record.sha256}})
    assert "would run" in problems(folder)[0] and "system" in problems(folder)[0]
    assert not (folder / "owned").exists()


def test_a_bare_pickle_is_no_torch_archive(tmp_path):
    path = tmp_path / "old.pt"
    path.write_bytes(pickle.dumps({"w": Attack()}))
    assert "not a torch archive" in unsafe_content(path)


def test_weights_that_the_manifest_does_not_know_are_refused(folder):
    torch.save({}, folder / "mp_rank_01_model_states.pt")
    assert problems(folder) == ["mp_rank_01_model_states.pt is not in the manifest"]


def test_ranks_share_the_reading(folder):
    manifest = Manifest.read(folder)
    shares = [manifest.share(rank, 3) for rank in range(3)]
    assert shares == [["model.pt"], ["state.json"], []]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": (1, 2)}}, "e": None}) == {"a.b": 1, "a.c.d": [1, 2], "e": None}


def test_hash_matches_what_was_written(tmp_path):
    path = tmp_path / "x.pt"
    with files.durable_file(path) as handle:
        torch.save({"w": torch.randn(100_000)}, handle)
        record = handle.close()
    assert record == files.hash_file(path)
    assert torch.load(path, weights_only=True)["w"].shape == (100_000,)


def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    files.write_atomic(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_remove_folder_starts_with_the_manifest(folder, monkeypatch):
    def stop(path):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(files.shutil, "rmtree", stop)
    with pytest.raises(OSError, match="I/O"):
        files.remove_folder(folder, first=MANIFEST_NAME)
    assert {path.name for path in folder.iterdir()} == set(NAMES)


def test_a_second_process_is_kept_out_of_a_run_folder(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from tbf.errors import run_program; from tbf.checkpoints.files import run_lock\n"
        "def main():\n    with run_lock(Path(sys.argv[1])): print('got it')\n"
        "sys.exit(run_program(main))"
    )

    def other():
        return subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)

    with files.run_lock(tmp_path):
        refused = other()
        assert refused.returncode == 4
        assert f"pid {os.getpid()}" in refused.stderr and refused.stderr.count("\n") == 1
    assert other().stdout == "got it\n"


def test_rng_of_every_library_continues_where_it_was(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)  # noqa: NPY002

    np.random.randn()  # noqa: NPY002 (leaves half a pair of normal numbers in numpy's state)
    random.gauss(0, 1)
    (tmp_path / "rng.pt").write_bytes(rng_bytes())
    expected = draw()
    draw()
    load_rng(tmp_path / "rng.pt")
    assert draw() == expected
    assert unsafe_content(tmp_path / "rng.pt") is None
