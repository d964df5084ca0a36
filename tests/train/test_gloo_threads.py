"""gloo's threads make no OpenMP teams of their own, which would slow every operator of a run on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tbf.train.gloo_threads import calm_gloo
from tests.helpers.gloo import deepspeed_on_gloo, run_distributed


def threads_added(rank, world_size, calm):
    """Threads of this process that large collectives of torch's and DeepSpeed's groups add."""
    deepspeed = deepspeed_on_gloo()
    torch.set_num_threads(2)
    if calm:
        with calm_gloo():
            groups = engine_groups(deepspeed)
    else:
        groups = engine_groups(deepspeed)
    assert torch.get_num_threads() == 2
    torch.ones(1 << 20).exp()  # the process's own team
    for group in groups:
        gather(group, 1)  # gloo's threads
    before = count_threads()
    for group in groups:
        gather(group, 1 << 18)
    return count_threads() - before


def engine_groups(deepspeed):
    model = torch.nn.Linear(4, 4)
    zero = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    zero["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=zero, dist_init_required=False
    )
    return [None, engine.optimizer.dp_process_group]


def gather(group, elements):
    sent = torch.zeros(elements)
    found = [[torch.empty_like(sent) for _ in range(dist.get_world_size())] for _ in range(64)]
    for work in [dist.all_gather(tensors, sent, group=group, async_op=True) for tensors in found]:
        work.wait()


def count_threads():
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_gloo_makes_no_teams_of_threads():
    """The second assertion fails when torch or gloo do so by themselves; then `calm_gloo` may go."""
    assert run_distributed(threads_added, 2, True) == [0, 0]
    assert min(run_distributed(threads_added, 2, False)) > 0
