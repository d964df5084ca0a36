"""The guard: what it lets pass, what it skips on every rank, when it goes back and when it gives up."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file

from tbf.checkpoints.folder import CheckpointFolder
from tbf.config import TrainConfig
from tbf.errors import TrainingHalted
from tbf.train.guard import Guard, SpikeRule
from tests.helpers.faults import KINDS, Fault, faults
from tests.helpers.gloo import run_distributed
from tests.helpers.runs import DS_ZERO2, DS_ZERO3, metrics, train_here, write_preset


class Optimizer:
    """The one method of DeepSpeed's ZeRO optimizer that the guard wraps, with a norm of our choice."""

    def __init__(self):
        self.norm = 1.0

    def scaled_global_norm(self):
        return torch.tensor(self.norm)


def take(guard, optimizer, step, loss, norm):
    """One step as the trainer and DeepSpeed take it; returns whether it was applied."""
    optimizer.norm = norm
    guard.before_update(loss)
    applied = math.isfinite(optimizer.scaled_global_norm())
    guard.after_update(step, loss, applied)
    return applied


def settled(**train):
    """A guard after 100 ordinary steps."""
    optimizer = Optimizer()
    guard = Guard(TrainConfig(**{"spike_window": 32, **train}), optimizer)
    noise = torch.Generator().manual_seed(0)
    for step in range(1, 101):
        wobble = torch.randn(2, generator=noise).tolist()
        assert take(guard, optimizer, step, 5.0 - 0.01 * step + 0.05 * wobble[0], math.exp(0.2 * wobble[1]))
    return guard, optimizer


@pytest.mark.parametrize(
    ("loss", "norm", "passes"),
    [(4.0, 1.0, True), (4.2, 1.5, True), (0.1, 1e-6, True), (6.0, 1.0, False), (4.0, 50.0, False),
     (math.nan, 1.0, False), (math.inf, 1.0, False), (4.0, math.nan, False), (4.0, math.inf, False)],
)  # fmt: skip
def test_ordinary_steps_pass_and_bad_ones_do_not(loss, norm, passes):
    guard, optimizer = settled()
    assert take(guard, optimizer, 101, loss, norm) == passes
    assert guard.skipped == (0 if passes else 1)
    assert not passes or not guard.reason


def test_without_the_spike_rule_only_what_is_not_finite_is_skipped():
    guard, optimizer = settled(spike_sigmas=0.0)
    assert take(guard, optimizer, 101, 1e6, 1e6)
    assert not take(guard, optimizer, 102, math.nan, 1.0)


def test_a_spike_does_not_move_the_rule_that_found_it():
    guard, optimizer = settled()
    limit = guard._losses.limit()
    for step in range(101, 104):
        assert not take(guard, optimizer, step, 60.0, 1.0)
    assert guard._losses.limit() == limit


def test_nothing_is_a_spike_before_half_a_window_is_known():
    rule = SpikeRule(sigmas=8.0, window=10, floor=0.02)
    rule.recent.extend([1.0] * 4)
    assert rule.limit() == math.inf
    rule.recent.append(1.0)
    assert rule.limit() == pytest.approx(1.16)


def test_skips_count_within_their_window_only():
    guard, optimizer = settled(max_bad_steps=3, bad_window=10)
    for step in (101, 106):
        take(guard, optimizer, step, math.nan, 1.0)
    assert not guard.exhausted and not guard.healthy
    take(guard, optimizer, 112, math.nan, 1.0)  # 101 has left the window
    assert list(guard.bad_steps) == [106, 112] and not guard.exhausted
    take(guard, optimizer, 113, math.nan, 1.0)
    assert guard.exhausted
    for step in range(114, 124):
        take(guard, optimizer, step, 4.0, 1.0)
    assert guard.healthy


def test_the_state_survives_json_and_decides_alike():
    guard, optimizer = settled()
    take(guard, optimizer, 101, math.nan, 1.0)
    other = Guard(guard.train, Optimizer())
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    assert other._losses.limit() == guard._losses.limit() < math.inf


def test_a_rollback_is_forgotten_once_the_run_is_past_the_failure():
    guard, optimizer = settled(max_bad_steps=1, bad_window=5, rollback_lr_factor=0.5)
    early = guard.state_dict()
    take(guard, optimizer, 101, math.nan, 1.0)
    before = guard.state_dict()
    guard.load_state_dict(early)
    guard.rolled_back(before, failed_at=101)
    assert (guard.rollbacks, guard.skipped, guard.lr_factor, guard.exhausted) == (1, 1, 0.5, False)
    take(guard, optimizer, 101, 4.0, 1.0)
    assert guard.rollbacks == 1
    take(guard, optimizer, 102, 4.0, 1.0)
    assert (guard.rollbacks, guard.lr_factor) == (0, 0.5)


# -- whole runs on two ranks

SHORT = {
    "max_steps": 16,
    "micro_batch_size": 2,
    "eval_every": 8,
    "save_every": 8,
    "spike_window": 6,
    "spike_sigmas": 30.0,
}


def two_ranks(rank, world_size, folder, scenarios):
    """Runs each scenario; returns its outcome by name: exit code or error, and what was logged."""
    outcome = {}
    for name, ds_config, overrides, what in scenarios:
        seen = []
        handler = logging.Handler()
        handler.emit = lambda record, seen=seen: seen.append(record.getMessage())
        logging.getLogger("tbf").addHandler(handler)
        preset = write_preset(folder, **SHORT)
        overrides = [*overrides, "model.num_layers=2", "model.num_loops=1", "model.layer_pattern=[retnet, titan_attn]"]
        try:
            with faults(*what):
                outcome[name] = [train_here(rank, world_size, preset, folder / name, *overrides, ds_config=ds_config)]
        except TrainingHalted as error:
            outcome[name] = [str(error)]
        logging.getLogger("tbf").removeHandler(handler)
        outcome[name].append([line for line in seen if "skipped on" in line or "ROLLBACK" in line])
    return outcome


SKIPPED = dict(zip(KINDS, range(7, 16, 2)))  # kind of fault -> data step, counted from 0
ONE_EACH = [Fault(kind, at, at, 1 if kind.startswith("nan") else None) for kind, at in SKIPPED.items()]
BACK = ["train.rollback_lr_factor=0.5", "model.use_bitnet=false"]
SCENARIOS = [
    ("plain", DS_ZERO2, ["train.spike_sigmas=0"], []),
    ("guarded", DS_ZERO2, [], []),
    ("skips", DS_ZERO2, ["train.max_bad_steps=9"], ONE_EACH),
    ("back", DS_ZERO2, BACK, [Fault("nan_gradient", 10, 12, rank=1)]),
    ("halt", DS_ZERO2, ["train.max_rollbacks=1"], [Fault("nan_activation", 9, 10**9, rank=1)]),
]  # fmt: skip


ZERO3 = [
    *(scenario for scenario in SCENARIOS if scenario[0] in ("plain", "back")),
    ("back-zero3", DS_ZERO3, [*BACK, "train.gradient_accumulation_steps=2", "train.micro_batch_size=1"],
     [Fault("nan_activation", 10, 12, rank=0)]),
]  # fmt: skip


@pytest.fixture(scope="module")
def zero3_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard-zero3")
    first, second = run_distributed(two_ranks, 2, folder, ZERO3)
    return folder, first, second


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    first, second = run_distributed(two_ranks, 2, folder, SCENARIOS)
    return folder, first, second


def rows(folder, name):
    return metrics(folder / name, "step", "loss", "grad_norm", "val_loss")


def test_a_guarded_run_in_which_nothing_happens_equals_a_plain_one_bitwise(runs):
    folder, first, _ = runs
    assert first["guarded"] == first["plain"] == [0, []]
    assert rows(folder, "guarded") == rows(folder, "plain")
    last = "checkpoints/step-00000016/mp_rank_00_model_states.pt"
    ours, theirs = (torch.load(folder / run / last, weights_only=True)["module"] for run in ("guarded", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_bad_step_on_one_rank_is_skipped_on_all(runs):
    folder, first, second = runs
    assert first["skips"] == second["skips"] and first["skips"][0] == 0
    for (kind, at), line in zip(SKIPPED.items(), first["skips"][1], strict=True):
        assert f"step {at + 1} skipped on every rank" in line and ("spike" in line) == kind.startswith("spike")
    assert rows(folder, "skips")[:8] == rows(folder, "plain")[:8]
    assert metrics(folder / "skips", "skipped")[-1] == ("5",)
    entries = CheckpointFolder(folder / "skips" / "checkpoints").entries()
    assert [(manifest.step, manifest.healthy) for _, manifest in entries] == [(16, False), (8, True)]


@pytest.mark.parametrize(
    ("name", "fixture"), [("back", "runs"), pytest.param("back-zero3", "zero3_runs", marks=pytest.mark.slow)]
)
def test_too_many_bad_steps_go_back_and_leave_their_rows_out(request, name, fixture):
    folder, first, second = request.getfixturevalue(fixture)
    assert first[name] == second[name] and first[name][0] == 0
    assert len(first[name][1]) == 4 and "ROLLBACK 1 of 3: from step 13" in first[name][1][3]
    assert "without the 20 rows" in first[name][1][3]
    taken = metrics(folder / name, "step", "lr")
    assert [int(step) for step, _ in taken] == list(range(17))
    plain = dict(metrics(folder / "plain", "step", "lr"))
    assert all(float(lr) == 0.5 * float(plain[step]) for step, lr in taken[9:])
    state = json.loads((folder / name / "checkpoints/step-00000016/trainer_state.json").read_text())
    assert state["step"] == 16 and state["cursor"] == (16 + 5) * 4 and state["guard"]["skipped"] == 3
    superseded = [line for line in (folder / name / "metrics.csv").read_text().splitlines() if line.endswith(",1")]
    assert [int(line.split(",")[0]) for line in superseded] == [9, 10, 11, 12, 13]


@pytest.mark.slow
def test_after_going_back_all_zero_stages_stand_at_the_same_weights(zero3_runs):
    folder, *_ = zero3_runs
    ours, theirs = (
        [float(loss) for (loss,) in metrics(folder / run, "loss") if loss] for run in ("back", "back-zero3")
    )
    assert len(ours) == 16 and ours == pytest.approx(theirs, abs=1e-5)


def test_when_going_back_does_not_help_it_halts_with_a_diagnosis(runs):
    folder, first, second = runs
    assert (
        first["halt"][0] == second["halt"][0] and "1 returns to an earlier checkpoint did not help" in first["halt"][0]
    )
    assert json.loads((folder / "halt" / "run_status.json").read_text())["state"] == "halted"
    (dump,) = (folder / "halt" / "emergency").iterdir()
    assert list(dump.glob("checkpoints/step-*/manifest.json"))
    assert set(load_file(dump / "batch_rank1.safetensors")) >= {"input_ids.0", "masked_labels.0"}
    diagnosis = json.loads((dump / "diagnosis.json").read_text())
    assert diagnosis["skipped_steps"] == [9, 10, 11] and diagnosis["non_finite_parameters"] == []
    assert diagnosis["reason"] == "loss nan"
    for rank in diagnosis["ranks"]:  # the fault is over: what is shown is a healthy step
        assert rank["first_bad_module"] is None and len(rank["largest_activations"]) == 8
        assert all(math.isfinite(norm) and norm > 0 for norm in rank["gradient_norms"].values())
