"""`tbf checkpoints`: what it shows, what it finds damaged, what it removes and what it never does."""

import pytest

from tbf import cli
from tbf.checkpoints.files import run_lock
from tbf.train.checkpoint import CheckpointStore
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def run_dir(tmp_path):
    """Steps 1 to 5; 2 is the best, 5 was saved in trouble."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=5)
    for step, loss in enumerate([5.0, 1.0, 3.0, 2.0, 4.0], start=1):
        store.save(FakeEngine(), step, {"step": step}, 0, 1, loss, healthy=step != 5)
    return tmp_path


def steps(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def damage(run_dir, step):
    (run_dir / "checkpoints" / f"step-{step:08d}" / "rng_rank0.pt").write_bytes(b"short")


def test_list_shows_losses_the_best_and_the_unhealthy(run_dir, capsys):
    (run_dir / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    assert cli.main(["checkpoints", str(run_dir)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "1.0000  best" in lines["step-00000002"] and "best" not in lines["step-00000001"]
    assert "unhealthy" in lines["step-00000005"] and "no readable manifest" in lines["step-00000003"]


def test_verify_names_the_damaged_one(run_dir, capsys):
    assert cli.main(["checkpoints", str(run_dir), "verify"]) == 0
    damage(run_dir, 4)
    assert cli.main(["checkpoints", str(run_dir), "verify"]) == 4
    shown = capsys.readouterr().out
    assert "step-00000004: DAMAGED" in shown and "rng_rank0.pt has 5 bytes" in shown and "step-00000003: whole" in shown


def test_prune_keeps_the_newest_the_last_healthy_and_the_best(run_dir, capsys):
    assert cli.main(["checkpoints", str(run_dir), "prune"]) == 0
    assert steps(run_dir) == [2, 3, 4, 5] and "removed step-00000001;" in capsys.readouterr().out


def test_prune_does_not_count_a_damaged_one(run_dir):
    damage(run_dir, 5)
    damage(run_dir, 4)
    assert cli.main(["checkpoints", str(run_dir), "prune", "--keep-best", "0"]) == 0
    assert steps(run_dir) == [2, 3]


def test_prune_removes_nothing_when_all_are_damaged(run_dir, capsys):
    for step in range(1, 6):
        damage(run_dir, step)
    assert cli.main(["checkpoints", str(run_dir), "prune"]) == 4
    assert steps(run_dir) == [1, 2, 3, 4, 5] and "nothing was removed" in capsys.readouterr().err


def test_a_run_in_training_is_left_alone(run_dir, capsys):
    with run_lock(run_dir):
        assert cli.main(["checkpoints", str(run_dir), "prune"]) == 4
    assert "in use by another process" in capsys.readouterr().err and len(steps(run_dir)) == 5


def test_no_checkpoints(tmp_path, capsys):
    assert cli.main(["checkpoints", str(tmp_path)]) == 4
    assert "holds no checkpoint" in capsys.readouterr().err
