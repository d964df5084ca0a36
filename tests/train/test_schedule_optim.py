from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tbf.config import DataConfig, RunConfig, TrainConfig
from tbf.data.masking import MaskSpec
from tbf.train.optim import parameter_groups
from tbf.train.schedule import decay_start, learning_rate, loop_count, moving_mask, weight_decay

TRAIN = TrainConfig(max_steps=100, warmup_steps=10, decay_share=0.2, learning_rate=1.0, min_lr_ratio=0.01)


def test_the_rate_rises_stays_and_falls():
    rates = [learning_rate(step, TRAIN) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert all(rate == 1.0 for rate in rates[9:81])
    assert all(a > b for a, b in itertools.pairwise(rates[80:]))
    assert rates[85] == pytest.approx(1 - 0.25**0.5) and rates[100] == 0.01


@pytest.mark.parametrize("changes", [{"warmup_steps": 0}, {"decay_share": 0.0}, {"decay_share": 1.0}])
def test_the_rate_stays_positive_at_the_edges(changes):
    train = TrainConfig(max_steps=10, **{"warmup_steps": 2, **changes})
    assert all(0 < learning_rate(step, train) <= train.learning_rate for step in range(12))


def test_the_mask_rate_falls_with_the_learning_rate():
    run = RunConfig(data=DataConfig(mask_rate=0.3, mask_rate_end=0.15), train=TRAIN)
    mask = moving_mask(MaskSpec(0.3, 100), run, step=0, cursor=0, rows_per_step=16)
    rates = [mask.rate_at(step * 16) for step in range(101)]
    assert decay_start(TRAIN) == 80 and set(rates[:81]) == {0.3} and rates[81] < 0.3 and rates[100] == 0.15
    resumed = moving_mask(MaskSpec(0.3, 100), run, step=50, cursor=50 * 16, rows_per_step=16)
    assert resumed == mask
    other_batch = moving_mask(MaskSpec(0.3, 100), run, step=50, cursor=50 * 16, rows_per_step=4)
    assert [other_batch.rate_at(50 * 16 + (step - 50) * 4) for step in range(50, 101)] == rates[50:]
    longer = moving_mask(MaskSpec(0.3, 100), run.replace(train={"max_steps": 200}), 50, 50 * 16, 16)
    assert longer.rate_at(159 * 16) == 0.3 and longer.rate_at(200 * 16) == 0.15
    assert moving_mask(MaskSpec(0.3, 100), RunConfig(train=TRAIN), 0, 0, 16).end_rate is None


def test_weight_decay_stops_halfway_only_in_the_two_stage_recipe():
    assert weight_decay(99, TRAIN) == TRAIN.weight_decay
    two = TrainConfig(max_steps=100, two_stage_weight_decay=True)
    assert [weight_decay(step, two) for step in (0, 49, 50)] == [0.1, 0.1, 0.0]


def test_loops_are_fixed_by_default_and_during_warm_up():
    assert {loop_count(step, TRAIN, 2) for step in range(100)} == {2}
    random = TrainConfig(max_steps=100, warmup_steps=60, stochastic_loops=True)
    assert {loop_count(step, random, 2) for step in range(60)} == {2}
    assert {loop_count(step, random, 2) for step in range(60, 200)} == {1, 2, 3}


def test_random_loops_follow_their_distribution_from_seed_and_step_alone():
    train = TrainConfig(warmup_steps=0, stochastic_loops=True)
    draws = [loop_count(step, train, 2) for step in range(10_000)]
    assert draws == [loop_count(step, train, 2) for step in range(10_000)]
    assert [draws.count(loops) / 10_000 for loops in (1, 2, 3)] == pytest.approx([0.1, 0.8, 0.1], abs=0.01)
    assert draws != [
        loop_count(step, TrainConfig(warmup_steps=0, stochastic_loops=True, seed=1), 2) for step in range(10_000)
    ]
    assert {loop_count(step, train, 1) for step in range(1000)} == {1, 2}


class Gate(nn.Module):
    no_weight_decay = frozenset({"matrix"})

    def __init__(self):
        super().__init__()
        self.matrix, self.plain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        self.vector = nn.Parameter(torch.ones(2))


def test_groups_cover_each_parameter_once():
    model = nn.Sequential(nn.Linear(2, 2), Gate(), nn.LayerNorm(2))
    model[0].weight = model[1].plain  # tied: still once
    decayed, undecayed = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[1].plain)]
    seen = [id(p) for group in (decayed, undecayed) for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters()) and len(set(seen)) == len(seen)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
