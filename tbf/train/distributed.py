"""Starts the process group through DeepSpeed and wraps the few collectives that the trainer needs."""

from __future__ import annotations

import contextlib
import io
import logging

import torch
import torch.distributed as dist

from tbf.errors import EngineError, HardwareError
from tbf.hardware.probe import check_device, cuda_facts
from tbf.train.environment import ProcessInfo


def start(process: ProcessInfo, on_cpu: bool) -> torch.device:
    """Joins the process group and returns this rank's device. Raises HardwareError when the card cannot be used."""
    if not on_cpu and not torch.cuda.is_available():
        raise HardwareError(
            f"this machine has an NVIDIA card, but torch {torch.__version__} sees none: run `tbf doctor`, which "
            "looks at the driver and at torch's build; to train on the CPU on purpose set DS_ACCELERATOR=cpu"
        )
    if not on_cpu:
        if process.local_rank >= torch.cuda.device_count():
            raise HardwareError(
                f"local rank {process.local_rank} has no card: torch sees {torch.cuda.device_count()} on this node; "
                "start fewer ranks"
            )
        check_device(cuda_facts(process.local_rank))
        torch.cuda.set_device(process.local_rank)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints on every rank
            deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise EngineError(
            f"rank {process.rank} could not join the process group: {str(error).splitlines()[0]}"
        ) from None
    return torch.device("cpu") if on_cpu else torch.device("cuda", process.local_rank)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums a small tensor over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
