"""Checkpoints: what a crash, a full disk or a damaged file does to them, and that a resumed run is the same run."""

import errno
import itertools
import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tbf.checkpoints import files
from tbf.checkpoints.manifest import MANIFEST_NAME, Manifest
from tbf.errors import CheckpointError, ConfigError
from tbf.train.checkpoint import CheckpointStore, other_shape
from tbf.train.deepspeed_io import engine_facts
from tests.helpers.fake_engine import FakeEngine


def save(store, step, val_loss=None, engine=None, **kwargs):
    engine = engine or FakeEngine()
    engine.weight = torch.full((8,), float(step))
    return store.save(engine, step, {"step": step, "lr": 0.1 + step}, 0, 1, val_loss, **kwargs)


def saved_steps(root):
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def load_newest(root):
    """Resumes as a new process would; returns (step, store)."""
    store, engine = CheckpointStore(root), FakeEngine()
    state = store.load(engine, "latest", 0, 1)
    assert torch.equal(engine.weight, torch.full((8,), float(state["step"])))
    return state["step"], store


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def three(root):
    """A run with checkpoints 1, 2 and 3."""
    store = CheckpointStore(root, keep_last=3)
    for step in (1, 2, 3):
        save(store, step)
    return root


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What a process wrote outlives its kill -9 without a sync; the order of the syncs has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# -- saving and rotation


def test_a_checkpoint_holds_what_it_says(root):
    path = save(CheckpointStore(root, fingerprint="f"), 500, 2.5)
    assert path == root / "step-00000500"
    assert {file.name for file in path.iterdir()} == {
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "rng_rank0.pt",
        "trainer_state.json",
        MANIFEST_NAME,
    }
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    assert manifest["step"] == 500 and manifest["val_loss"] == 2.5 and manifest["fingerprint"] == "f"
    assert manifest["world_size"] == 1 and manifest["zero_stage"] == 2 and manifest["optimizer"] == "AdamW"
    assert set(manifest["versions"]) == {"tbf", "torch", "deepspeed", "python"}
    assert manifest["model"] == {"hidden_size": 8}
    model = torch.load(path / "mp_rank_00_model_states.pt", weights_only=True)
    assert model["universal_checkpoint_info"] == {"universal_checkpoint_version": 0.2}
    assert (root / "latest").read_text() == "step-00000500\n"
    assert json.loads((root / "best.json").read_text()) == [
        {"checkpoint": "step-00000500", "step": 500, "val_loss": 2.5}
    ]
    assert not list(root.glob(".*"))


def test_state_returns_as_it_was_given(root):
    save(CheckpointStore(root), 3)
    engine = FakeEngine()
    assert CheckpointStore(root).load(engine, root / "step-00000003", 0, 1) == {"step": 3, "lr": 3.1}
    assert torch.equal(engine.weight, torch.full((8,), 3.0))


def test_rotation_keeps_the_last_and_the_best(root):
    store = CheckpointStore(root, keep_last=2, keep_best=1)
    for step, loss in [(1, 5.0), (2, 1.0), (3, 3.0), (4, None), (5, 2.0)]:
        save(store, step, loss)
    assert saved_steps(root) == [2, 4, 5]
    assert store.best() == root / "step-00000002"
    assert store.latest() == root / "step-00000005"
    save(store, 6, 0.5)
    assert saved_steps(root) == [5, 6]


def test_unhealthy_checkpoints_never_push_out_healthy_ones(root):
    store = CheckpointStore(root, keep_last=2, keep_best=1)
    save(store, 1, 4.0)
    save(store, 2, 3.0)
    for step in (3, 4, 5):
        save(store, step, float("nan"))
    assert saved_steps(root) == [1, 2, 5]
    save(store, 6, 0.1, healthy=False)
    assert saved_steps(root) == [1, 2, 6]
    assert store.best() == root / "step-00000002"


def test_the_same_step_is_not_written_twice(root):
    store = CheckpointStore(root)
    path = save(store, 1)
    before = path.stat().st_ino
    assert save(store, 1) == path and path.stat().st_ino == before


def test_keeping_fewer_than_two_is_refused(root):
    with pytest.raises(ConfigError, match="at least 2"):
        CheckpointStore(root, keep_last=1)


def test_state_must_be_plain(root):
    with pytest.raises(TypeError, match="JSON"):
        CheckpointStore(root).save(FakeEngine(), 1, {"path": Path("x")}, 0, 1)
    assert not root.exists()


def test_client_state_that_could_not_be_loaded_again_is_refused_when_saving(root):
    engine = FakeEngine()
    engine.moment = Path("not a tensor")
    with pytest.raises(CheckpointError, match=r"would run pathlib"):
        save(CheckpointStore(root), 1, engine=engine)
    assert saved_steps(root) == []


def test_everything_is_on_the_disk_before_it_counts(root, monkeypatch):
    CheckpointStore(root).prepare(FakeEngine(), 0)
    events = []

    def note(kind, function):
        def call(target, *others):
            path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else str(target)
            events.append((kind, Path(path).name))
            return function(target, *others)

        return call

    monkeypatch.setattr(os, "fsync", note("sync", os.fsync))
    monkeypatch.setattr(os, "rename", note("rename", os.rename))
    monkeypatch.setattr(os, "replace", note("rename", os.replace))
    path = save(CheckpointStore(root), 5)
    commit = events.index(("rename", path.name))
    before, after = events[:commit], events[commit + 1 :]
    written = {file.name for file in path.iterdir()}
    assert {name for _, name in before} == written | {path.name}
    manifest = before.index(("sync", MANIFEST_NAME))
    assert {name for _, name in before[:manifest]} == written - {MANIFEST_NAME} | {path.name}
    assert before[manifest + 1 :] == [("sync", path.name)]
    assert after[0] == ("sync", root.name)
    assert next(name for kind, name in after if kind == "rename").startswith(".latest.tmp")


# -- a fresh run, and one that resumed earlier than the newest checkpoint


def test_nothing_saved_yet(root):
    store = CheckpointStore(root)
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        store.find("latest")
    with pytest.raises(CheckpointError, match="validation loss"):
        store.find("best")


def test_a_run_that_did_not_resume_refuses_to_rotate_away_another_ones_checkpoints(three):
    store = CheckpointStore(three)
    with pytest.raises(CheckpointError, match="did not resume from"):
        store.prepare(FakeEngine(), 0)
    with pytest.raises(CheckpointError, match="--resume auto"):
        save(store, 1)
    assert saved_steps(three) == [1, 2, 3]


def test_resuming_earlier_gives_up_the_newer_ones_only_once_a_new_one_is_complete(three):
    store = CheckpointStore(three, keep_last=3)
    store.load(FakeEngine(), three / "step-00000001", 0, 1)
    assert saved_steps(three) == [1, 2, 3]
    engine = FakeEngine()
    engine.weight = torch.full((8,), 22.0)
    store.save(engine, 2, {"step": 22}, 0, 1)
    assert saved_steps(three) == [1, 2] and not list(three.glob("superseded*"))
    assert CheckpointStore(three).load(FakeEngine(), "latest", 0, 1) == {"step": 22}


# -- damage


def test_find_by_name_and_step(three):
    store = CheckpointStore(three)
    assert store.find(2) == store.find("2") == three / "step-00000002"
    with pytest.raises(CheckpointError, match="there are: 1, 2, 3"):
        store.find(9)
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        store.find("newest")


FILES = ("mp_rank_00_model_states.pt", "rng_rank0.pt", "trainer_state.json", MANIFEST_NAME)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(three, name, damage, caplog):
    path = three / "step-00000003" / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    with caplog.at_level(logging.ERROR):
        assert load_newest(three)[0] == 2
    assert "SKIPPING the newest checkpoint" in caplog.text and name in caplog.text
    assert "falling back" in caplog.text and "step-00000002" in caplog.text
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        CheckpointStore(three).find(3)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_deepspeeds_loader_cannot_be_made_to_run_code(tmp_path, monkeypatch):
    from tbf.train.deepspeed_io import DurableCheckpointEngine

    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer_state_dict": Attack()}, "optim_states.pt")
    with pytest.raises(CheckpointError, match=r"optim_states\.pt is refused"):
        DurableCheckpointEngine().load("optim_states.pt", map_location="cpu")
    assert not Path("owned").exists()


def test_no_saved_file_holds_an_enumeration(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from tbf.train.deepspeed_io import DurableCheckpointEngine

    path, state = tmp_path / "optim_states.pt", {"zero_stage": ZeroStageEnum.gradients, "loss_scaler": None}
    engine = DurableCheckpointEngine()
    engine.save({"optimizer_state_dict": state, "ds_version": "0"}, str(path))
    assert engine.problem is None and type(state["zero_stage"]) is ZeroStageEnum
    saved = torch.load(path, weights_only=True)
    assert type(saved["optimizer_state_dict"]["zero_stage"]) is int
    assert saved == {"optimizer_state_dict": {"zero_stage": 2, "loss_scaler": None}, "ds_version": "0"}


def test_when_all_are_damaged_it_stops_rather_than_start_over(three):
    for folder in three.iterdir():
        (folder / "rng_rank0.pt").unlink() if folder.is_dir() else None
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged \(3 tried"):
        CheckpointStore(three).latest()


@pytest.mark.parametrize("text", [None, "", "step-00000099\n", "../..", "\x00"])
def test_a_useless_latest_file_does_not_matter(three, text):
    (three / "latest").unlink()
    if text is not None:
        (three / "latest").write_text(text)
    assert load_newest(three)[0] == 3


def test_the_best_falls_back_too(root):
    store = CheckpointStore(root)
    save(store, 1, 1.0)
    save(store, 2, 2.0)
    (root / "step-00000001" / "rng_rank0.pt").unlink()
    assert CheckpointStore(root).find("best") == root / "step-00000002"


def test_a_damaged_newest_one_goes_when_the_run_has_a_new_one(three):
    (three / "step-00000003" / "rng_rank0.pt").unlink()
    _, store = load_newest(three)
    save(store, 4)
    assert saved_steps(three) == [2, 4]


# -- another run's checkpoints


def test_another_model_is_refused_with_a_cure(three):
    with pytest.raises(CheckpointError, match=r"another model \(hidden_size 8 there, 16 here\).*--run-dir"):
        CheckpointStore(three).load(FakeEngine(hidden=16), "latest", 0, 1)


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    [
        (1, {}, ""),
        (2, {}, "rank(s) 1 there, 2 here"),
        (1, {"stage": 3}, "as ZeRO stage 2 there, 3 here"),
        (1, {"order": ("b", "a")}, "parameters in another order"),
    ],
)
def test_what_must_be_converted(three, world_size, changes, expected):
    facts = engine_facts(FakeEngine(**changes))
    assert other_shape(Manifest.read(three / "step-00000003"), facts, world_size) == expected


def test_other_data_settings_are_refused(root):
    save(CheckpointStore(root, fingerprint="here"), 1)
    with pytest.raises(CheckpointError, match="other data settings"):
        CheckpointStore(root, fingerprint="there").load(FakeEngine(), "latest", 0, 1)
    CheckpointStore(root).load(FakeEngine(), "latest", 0, 1)  # one that states none does not compare


# -- the disk


def test_a_disk_too_small_is_refused_before_anything_is_written(three, monkeypatch):
    _, store = load_newest(three)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=4096))
    for call in (lambda: store.prepare(FakeEngine(), 0), lambda: save(store, 4)):
        with pytest.raises(CheckpointError, match=r"needs 0\.07 GB .* has 0\.00 GB free; free some space"):
            call()
    assert saved_steps(three) == [1, 2, 3] and not list(three.glob(".saving*"))


def test_the_first_checkpoint_is_estimated_from_the_parameters(root, monkeypatch):
    engine = FakeEngine()
    engine.hidden = 10**9  # two parameters of that size: 32 GB
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=20 * 10**9, f_frsize=1))
    with pytest.raises(CheckpointError, match=r"needs 33\.67 GB"):
        CheckpointStore(root).prepare(engine, 0)


@pytest.mark.parametrize("when", range(8))
def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_ones(three, when, monkeypatch):
    _, store = load_newest(three)
    calls = itertools.count()
    write = files.DurableFile.write

    def fill(handle, data):
        if next(calls) >= when:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(files.DurableFile, "write", fill)
    with pytest.raises(CheckpointError, match=r"cannot (save|write) .*No space left"):
        save(store, 4)
    monkeypatch.undo()
    assert saved_steps(three) == [1, 2, 3] and not list(three.glob(".saving*"))
    save(store, 4)
    assert load_newest(three)[0] == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to drop its rights")
def test_a_folder_without_write_permission(three):
    _, store = load_newest(three)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"cannot write to .*checkpoints.*Permission denied"):
            store.prepare(FakeEngine(), 0)
    finally:
        os.seteuid(0)


# -- kill -9 at every write, sync, rename and deletion of a save


def kill_at(operation):
    """From now on, this process is killed at its n-th change of the disk."""
    count = itertools.count()

    def deadly(function):
        def call(*args, **kwargs):
            if next(count) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    files.DurableFile.write = deadly(files.DurableFile.write)


def test_killed_anywhere_in_a_save(tmp_path):
    save(CheckpointStore(tmp_path / "warm-up"), 1)  # imports everything before the forks
    newest, operation = [], 0
    while not newest or newest[-1] != "complete":
        root = tmp_path / str(operation)
        store = CheckpointStore(root)
        for step in (1, 2):
            save(store, step)
        child = os.fork()
        if child == 0:
            try:
                kill_at(operation)
                save(store, 3)
                os._exit(0)
            finally:
                os._exit(9)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        step, resumed = load_newest(root)
        newest.append("complete" if status == 0 else step)
        save(resumed, 4)
        assert load_newest(root)[0] == 4
        assert not list(root.glob(".saving*")) and not list(root.glob(".deleting*"))
        operation += 1
    killed = newest[:-1]
    assert len(killed) > 30
    assert killed == sorted(killed) and set(killed) == {2, 3}  # once it is there it stays


# -- beside training


def test_a_save_in_the_background_holds_what_was_true_when_it_began(root):
    store, engine = CheckpointStore(root), FakeEngine()
    path = save(store, 1, engine=engine, background=True)
    engine.weight.zero_()
    store.finish()
    assert Manifest.read(path).step == 1 and load_newest(root)[0] == 1  # which compares the weights
    assert not list(root.glob(".*"))


def test_a_copy_keeps_what_is_shared_shared():
    from tbf.train.background import snapshot

    weight = torch.arange(6.0)
    state = {"a": weight, "tied": weight, "part": [weight[2:4]], "pair": (1, weight)}
    copied = snapshot(state)
    weight.zero_()
    assert copied["a"] is copied["tied"] is copied["pair"][1] and copied["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["part"][0].tolist() == [2, 3] and copied["part"][0].untyped_storage().nbytes() == 8


def test_without_memory_for_a_copy_it_waits_and_says_so_once(root, monkeypatch, caplog):
    monkeypatch.setattr("tbf.train.background.host_memory", lambda: (10**9, 10))
    store = CheckpointStore(root)
    for step in (1, 2):
        save(store, step, background=True)
        assert store._saving is None and saved_steps(root)[-1] == step
    assert [record.levelname for record in caplog.records if "no memory for a copy" in record.message] == ["WARNING"]


def test_a_failure_in_the_background_comes_to_light_and_the_earlier_ones_stay(three, monkeypatch):
    _, store = load_newest(three)

    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.DurableFile, "write", full)
    save(store, 4, background=True)
    with pytest.raises(CheckpointError, match="No space left"):
        store.finish()
    monkeypatch.undo()
    assert saved_steps(three) == [1, 2, 3] and not list(three.glob(".saving*"))
    assert load_newest(three)[0] == 3


def test_importing_the_reading_side_does_not_need_deepspeed():
    code = "import sys, tbf.train.checkpoint; sys.exit('deepspeed' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
