from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tbf.config import TrainConfig
from tbf.train.optim import parameter_groups
from tbf.train.schedule import learning_rate, weight_decay

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


def test_weight_decay_stops_halfway_only_in_the_two_stage_recipe():
    assert weight_decay(99, TRAIN) == TRAIN.weight_decay
    two = TrainConfig(max_steps=100, two_stage_weight_decay=True)
    assert [weight_decay(step, two) for step in (0, 49, 50)] == [0.1, 0.1, 0.0]


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
