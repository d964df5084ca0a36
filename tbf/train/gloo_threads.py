"""Keeps gloo's threads out of the way of a run on the CPU.

Each of gloo's threads copies what it gathers with as many OpenMP threads as torch was set to, a team of its own. From
the first such team on, libgomp counts more threads than processors, and lets the run's own threads sleep between two
parallel operators instead of wait: operators that move memory take twice as long. A thread asks torch for its number of
threads once, at its first large operator; so that one is made to fall where torch is set to a single thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

_ELEMENTS = 1 << 17  # above what torch copies with one thread anyway
_GATHERS = 32  # at once, so that each of a group's two threads gets some


@contextlib.contextmanager
def calm_gloo() -> Iterator[None]:
    """Around what makes process groups and their first large collectives: gloo's threads stay single from then on.

    Collective at its end; does nothing where tensors do not go through gloo.
    """
    if not dist.is_initialized() or dist.get_backend() != "gloo":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
        from deepspeed.utils import groups

        for group in (None, groups._get_data_parallel_group()):  # the second is DeepSpeed's copy of the first
            _gather(group)
    finally:
        torch.set_num_threads(threads)


def _gather(group: dist.ProcessGroup | None) -> None:
    sent = torch.zeros(_ELEMENTS)
    found = [torch.empty_like(sent) for _ in range(dist.get_world_size())]  # all gather the same zeros there
    for work in [dist.all_gather(found, sent, group=group, async_op=True) for _ in range(_GATHERS)]:
        work.wait()
