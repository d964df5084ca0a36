from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tbf.cli import main
from tbf.config import load_run_config
from tbf.hardware.devices import DEVICES
from tbf.planning.changes import write_up
from tbf.planning.engine_state import Engine
from tbf.planning.plan import Machine, Planner
from tbf.planning.search import NO_CURE, cures, suggest, with_cures

SMALL = ["model.num_layers=2", "data.seq_len=64", "train.micro_batch_size=8"]
ENGINE = Engine(2, "cpu", reduce_bucket=1_000_000, granularity="none")


def planner_of(memory):
    return Planner(Machine(replace(DEVICES["p40"], memory=memory)))


def test_a_cure_makes_the_plan_fit_and_says_what_to_write():
    run = load_run_config("mini", SMALL)
    needed = planner_of(1e12).plan(run, ENGINE).verdicts[0].needed
    planner = planner_of(needed - 1)
    plan = with_cures(planner, planner.plan(run, ENGINE), run, ENGINE)
    assert not plan.fits and plan.verdicts[0].cure.startswith("would fit with ")
    found = cures(planner, run, ENGINE, count=3)
    assert found and all(changed.fits for _, changed in found)
    assert found[0][1].time.total == min(changed.time.total for _, changed in found)
    for change, _ in found:
        assert write_up((run, ENGINE), (change.run, change.engine))


def test_nothing_cures_a_machine_without_memory():
    run = load_run_config("mini", [*SMALL, "train.micro_batch_size=1"])
    planner = planner_of(1e6)
    plan = with_cures(planner, planner.plan(run, ENGINE), run, ENGINE)
    assert plan.verdicts[0].cure == NO_CURE
    assert suggest(planner, run, ENGINE) is None


def test_a_suggestion_keeps_the_global_batch_and_is_no_slower():
    run = load_run_config("mini", [*SMALL, "train.micro_batch_size=2", "train.gradient_accumulation_steps=2"])
    engine = replace(ENGINE, accumulation=2, granularity="loop")
    planner = planner_of(24e9)
    change, best = suggest(planner, run, engine)
    assert best.fits and best.time.total < planner.plan(run, engine).time.total
    assert change.run.train.micro_batch_size * change.engine.accumulation == 4


@pytest.mark.parametrize(("ram", "code"), [("128", 0), ("0.1", 5)])
def test_the_verb_leaves_5_when_it_does_not_fit(capsys, ram, code):
    line = ["plan", "mini", "--ds_config", "ds_configs/p40_zero2.json", "--host-ram", ram, "--seq-len", "32", "--json"]
    line += ["--tokens", "1e9"]
    assert main([*line, "--micro-batch", "1", "--set", "model.num_layers=1"]) == code
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is (code == 0)
    assert plan["shape"]["tokens"] == 32 and plan["memory"]["device"] > 0
    assert plan["days"] * plan["tokens_per_day"] == pytest.approx(plan["tokens"]) == 1e9


@pytest.mark.parametrize("option", ["--gpus", "--nodes", "--host-ram", "--disk", "--network", "--tokens"])
@pytest.mark.parametrize("value", ["0", "-5"])
def test_sizes_that_cannot_be_are_refused(capsys, option, value):
    assert main(["plan", "mini", "--ds_config", "ds_configs/p40_zero2.json", option, value]) == 2
    assert f"{option} is {value}" in capsys.readouterr().err
