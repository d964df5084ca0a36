"""Starts the process group through DeepSpeed and wraps the few collectives that the trainer needs."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from typing import Any

import torch
import torch.distributed as dist

from tbf.errors import EngineError, HardwareError, TbfError, first_line
from tbf.hardware.probe import check_device, cuda_facts
from tbf.train.environment import ProcessInfo
from tbf.train.joining import join

_LETTING_GO_S = 0.1
"""For gloo's threads, which outlive their group where DeepSpeed keeps it, to free what they sent last: they need the
interpreter for that, and abort the process (SIGABRT) when it is gone."""


def start(
    process: ProcessInfo, on_cpu: bool, facts: dict[str, dict[str, Any]] | None = None, problem: TbfError | None = None
) -> torch.device:
    """Joins the process group and returns this rank's device.

    `facts` are compared with the other ranks', `problem` is what already stops this one; see `joining`. Raises
    HardwareError when the card cannot be used, and what any other rank raised.
    """
    if problem is None and not on_cpu:
        try:
            _take_card(process)
        except HardwareError as error:
            problem = error
    store = join(process, facts or {}, problem)
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    backend = "gloo" if on_cpu else "nccl"
    try:
        dist.init_process_group(
            backend, store=store, rank=process.rank, world_size=process.world_size, timeout=default_pg_timeout
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints on every rank
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"rank {process.rank} could not join the process group: {first_line(error)}") from None
    return torch.device("cpu") if on_cpu else torch.device("cuda", process.local_rank)


def _take_card(process: ProcessInfo) -> None:
    if not torch.cuda.is_available():
        raise HardwareError(
            f"this machine has an NVIDIA card, but torch {torch.__version__} sees none: run `tbf doctor`, which "
            "looks at the driver and at torch's build; to train on the CPU on purpose set DS_ACCELERATOR=cpu"
        )
    if process.local_rank >= torch.cuda.device_count():
        raise HardwareError(
            f"local rank {process.local_rank} has no card: torch sees {torch.cuda.device_count()} on this node; "
            "start fewer ranks"
        )
    check_device(cuda_facts(process.local_rank))
    torch.cuda.set_device(process.local_rank)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums a small tensor over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        threads_hold_tensors = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if threads_hold_tensors:
            time.sleep(_LETTING_GO_S)
