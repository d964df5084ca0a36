"""What a plan tells a user to write is what it was made for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tbf.config import load_run_config
from tbf.planning.changes import other_details, other_granularities, other_micro_batches, other_places, write_up
from tbf.train.ds_config import load_ds_config

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
ONLY_ZERO_3 = ("sub_group", "prefetch", "max_live", "persistence", "param_buffers", "param_buffer_size", "max_in_cpu")
KINDS = (other_places, other_granularities, other_micro_batches, other_details)


def in_force(engine):
    """The engine without what does nothing at its stage, and without the folder that a user has to name."""
    idle = dict.fromkeys(ONLY_ZERO_3, 0) if engine.stage < 3 else {}
    return replace(engine, nvme_path="", stage_keys=(), **idle)


def applied(config, lines):
    """The ds_config and the overrides after the lines, read as a user would."""
    overrides = []
    for line in lines:
        if line.startswith("--set "):
            overrides.append(line.removeprefix("--set "))
            continue
        key, _, value = line.removeprefix("ds_config: ").removeprefix("remove ").partition(" = ")
        *path, last = key.split(".")
        block = config
        for name in path:
            block = block.setdefault(name, {})
        if value:
            block[last] = json.loads(value)
        else:
            del block[last]
    return config, overrides


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_lines_give_the_engine_that_was_planned(path, tmp_path):
    resolved, run = load_ds_config(path, load_run_config("mini"), 1)
    engine = resolved.as_planned()
    changes = [change for kind in KINDS for change in kind(run, engine)]
    assert len(changes) > 12
    for change in changes:
        lines = write_up((run, engine), (change.run, change.engine))
        config, overrides = applied(json.loads(path.read_text()), lines)
        (tmp_path / "ds_config.json").write_text(json.dumps(config))
        again, run_again = load_ds_config(tmp_path / "ds_config.json", load_run_config("mini", overrides), 1)
        assert in_force(again.as_planned()) == in_force(change.engine), (change.summary, lines)
        assert run_again == change.run, (change.summary, lines)
