"""The fault suite itself: a few faults of the cheap kinds every time, and that it notices what breaks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tbf.checkpoints.manifest import Manifest
from tests.faults import damage, saves
from tests.faults.tally import Tally, figures, table
from tests.helpers.runs import ROOT


def suite(*arguments):
    line = [sys.executable, "-m", "tests.faults", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])["figures"]


def test_a_few_faults_of_the_cheap_kinds_are_survived():
    found = suite("--quick")
    assert found["survived"] == found["tried"] > 80 and found["corrupt_resumes"] == 0


@pytest.mark.slow
def test_all_faults_are_survived():
    found = suite()
    assert found["survived"] == found["tried"] > 400 and found["corrupt_resumes"] == 0


CARELESS = """
import sys
from pathlib import Path

from tbf.train.checkpoint import CheckpointStore
from tests.faults import processes, saves

commit = CheckpointStore._commit

def careless(store, *what):
    for path, _ in store.entries()[:2]:
        store._delete(path)
    commit(store, *what)

CheckpointStore._commit = careless
processes.warm_up()
tally = saves.kill_saves(Path(sys.argv[1]), every=15)
print(tally.survived, tally.tried, len(tally.problems))
"""


def test_a_save_that_deletes_too_early_is_noticed(tmp_path):
    """With the old ones deleted before the new one is renamed, some kill leaves too little."""
    line = [sys.executable, "-c", CARELESS, str(tmp_path)]  # its own process: the suite forks, this one has threads
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    survived, tried, problems = map(int, done.stdout.split()[-3:])
    assert survived < tried and problems


def test_an_unverified_checkpoint_is_noticed(tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    saves.three_saved(straight / "checkpoints")
    monkeypatch.setattr(Manifest, "problem_with", lambda manifest, folder, name: None)
    cut, flipped, missing = damage.damage_checkpoints(tmp_path, straight)
    assert cut.survived < cut.tried and flipped.corrupt > 0 and missing.survived == missing.tried


def test_the_table_shows_what_failed():
    row = Tally("a fault", "survives")
    row.record(lost=2, seconds=0.01)
    row.record("it broke", corrupt=True, lost=1)
    shown = table([row, Tally("another", "-", skipped="no root")])
    assert "| a fault | survives | 2 | 1 | 2 | < 0.1 |" in shown and "a fault: it broke" in shown
    assert "not tried: no root" in shown
    found = figures([row])
    assert (found["tried"], found["survived"], found["corrupt_resumes"]) == (2, 1, 1)
