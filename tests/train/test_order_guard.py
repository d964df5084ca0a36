from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tbf.errors import EngineError
from tbf.train.order_guard import GradientOrderGuard
from tests.helpers.gloo import run_distributed


def diverge(rank, world_size):
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    guard = GradientOrderGuard(model)
    for layers in (model, model if rank == 0 else reversed(model)):
        x = torch.ones(1, 2)
        for layer in layers:
            x = layer(x)
        x.sum().backward()
        try:
            guard.check()
        except EngineError as error:
            return str(error)
    return ""


def test_ranks_that_run_layers_in_another_order_are_refused():
    for message in run_distributed(diverge, 2):
        assert "ranks [1] made their gradients ready in another order" in message


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpoints_of_a_shared_layer_are_refused(reentrant):
    layer = nn.Linear(2, 2)
    guard = GradientOrderGuard(layer)
    x = torch.ones(1, 2, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=reentrant)
    x.sum().backward()
    if reentrant:
        with pytest.raises(EngineError, match=r"was reduced twice .*use_reentrant=False"):
            guard.check()
    else:
        guard.check()


def test_it_stops_watching():
    layer = nn.Linear(2, 2)
    guard = GradientOrderGuard(layer, passes=1)
    for _ in range(2):
        layer(torch.ones(1, 2)).sum().backward()
        guard.check()
    assert not guard._ready and not layer.weight._post_accumulate_grad_hooks
