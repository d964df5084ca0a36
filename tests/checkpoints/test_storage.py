"""Machines without a shared folder: each keeps its part of a checkpoint, and `gather` makes it whole."""

import subprocess

import pytest

from tbf import cli
from tbf.checkpoints import gathering
from tbf.checkpoints.folder import CheckpointFolder
from tbf.checkpoints.storage import Storage, find_storage
from tbf.errors import CheckpointError
from tbf.train.checkpoint import CheckpointStore
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.gloo import run_distributed


def three_ranks_on_two_machines(rank, world_size, root):
    """Ranks 0 and 1 share a folder, rank 2 has its own."""
    home = root / ("node1" if rank < 2 else "node2")
    storage = find_storage(home)
    left = [path.name for path in home.glob(".lock-seen-*")] if rank == 2 else []
    store = CheckpointStore(home / "checkpoints", storage=storage)
    engine = FakeEngine(rank)
    folder = store.save(engine, 1, {"step": 1}, rank, world_size, val_loss=1.0)
    store.save(engine, 2, {"step": 2}, rank, world_size)

    fresh = FakeEngine(rank)
    again = CheckpointStore(home / "checkpoints", storage=storage)
    state = again.load(fresh, "latest", rank, world_size)
    assert state == {"step": 2} and fresh.moment[0] == rank

    if rank == 2:
        (home / "checkpoints" / "step-00000002" / "rng_rank2.pt").write_bytes(b"short")
    back = CheckpointStore(home / "checkpoints", storage=storage).latest()
    return storage.members, storage.shared, left, folder.parent.parent.name, back.name


def test_each_machine_keeps_its_part_and_all_fall_back_together(tmp_path, capsys):
    found = run_distributed(three_ranks_on_two_machines, 3, tmp_path)
    assert found == [
        ((0, 1), False, [], "node1", "step-00000001"),
        ((0, 1), False, [], "node1", "step-00000001"),
        ((2,), False, [], "node2", "step-00000001"),
    ]
    near, far = (tmp_path / name / "checkpoints" / "step-00000001" for name in ("node1", "node2"))
    names = {path.name for path in far.iterdir()}
    assert {"mp_rank_00_model_states.pt", "rng_rank2.pt", "trainer_state.json", "manifest.json"} < names
    assert not (near / "rng_rank2.pt").exists() and not (far / "rng_rank0.pt").exists()

    run_dir = str(tmp_path / "node1")
    assert cli.main(["checkpoints", run_dir]) == 0
    assert "2 files on other machines (gather)" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="checkpoints RUN gather"):
        CheckpointStore(near.parent).load(FakeEngine(), near, 0, 1)
    # The damaged file of step 2 is refused, and step 1 can still be taken.
    assert cli.main(["checkpoints", run_dir, "gather", str(tmp_path / "node2")]) == 4
    assert "has another rng_rank2.pt of step-00000002" in capsys.readouterr().err
    (tmp_path / "node2" / "checkpoints" / "step-00000002" / "rng_rank2.pt").unlink()
    assert cli.main(["checkpoints", run_dir, "gather", str(tmp_path / "node2")]) == 4
    shown = capsys.readouterr().out
    assert "step-00000002: still missing rng_rank2.pt" in shown and "step-00000001: complete" in shown
    whole = CheckpointFolder(tmp_path / "node1" / "checkpoints").verify(near)
    assert not whole.elsewhere and {"rng_rank2.pt", "zero_pp_rank_2_mp_rank_00_optim_states.pt"} < set(whole.files)
    fresh = FakeEngine(2)
    CheckpointStore(near.parent).load(fresh, near, 2, 3)
    assert fresh.moment[0] == 2


def test_a_remote_folder_is_copied_by_scp_without_a_shell(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(gathering.subprocess, "run", lambda line, **_: lines.append(line) or done(1, "x: No such file"))
    assert gathering._fetch("me@node2:/runs/a b", "step-00000001", ["rng_rank1.pt"], tmp_path) == []
    assert lines[0][-2:] == [
        "me@node2:/runs/a b/checkpoints/step-00000001/rng_rank1.pt",
        str(tmp_path / "rng_rank1.pt"),
    ]
    with pytest.raises(CheckpointError, match="no host name"):
        gathering._fetch("-oProxyCommand=x:/runs", "step-00000001", ["a"], tmp_path)
    monkeypatch.setattr(gathering.subprocess, "run", lambda line, **_: done(255, "Permission denied (publickey)."))
    with pytest.raises(CheckpointError, match="Permission denied"):
        gathering._fetch("node2:/runs", "step-00000001", ["a"], tmp_path)


def done(code, text):
    return subprocess.CompletedProcess([], code, "", text)


def test_a_shared_folder_is_one_storage():
    assert Storage((0, 1)).leads(0) and not Storage((0, 1)).leads(1) and Storage((0, 1)).place(1) == (1, 2)
