"""What the ranks of a job tell each other outside the training step.

Works alone too: without a process group this process is rank 0 of 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from tbf.errors import CheckpointError, TbfError

Result = TypeVar("Result")


def this_rank() -> int:
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    return dist.get_world_size() if _grouped() else 1


def gather(value: Any) -> list[Any]:
    """Returns every rank's value, in rank order. Collective; for small picklable objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Returns rank 0's value on every rank. Collective."""
    return gather(value)[0]


def on_rank_0(function: Callable[[], Result]) -> Result:
    """Runs `function` on rank 0 and gives every rank its result, or its error, so that none is left waiting."""
    result, problem = None, None
    if this_rank() == 0:
        try:
            result = function()
        except TbfError as error:
            problem = error
    result, problem = from_rank_0((result, problem))
    if problem is not None:
        problem.on_every_rank = True
        raise problem
    return result


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Runs a block without collectives on every rank; if it fails on one, all raise the same error.

    A rank that raised alone would leave the others waiting in their next collective. OSError becomes CheckpointError.
    """
    problem: TbfError | None = None
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        problem = CheckpointError(f"{what}:{where} {error.strerror or error}")
    except TbfError as error:
        problem = error
    raise_together(problem)


def raise_together(problem: TbfError | None) -> None:
    """Raises the first rank's problem on all of them. Collective."""
    problems = gather(problem)
    for rank, error in enumerate(problems):
        if error is not None:
            shared = type(error)(str(error) if len(problems) == 1 else f"{error} (on rank {rank})")
            shared.on_every_rank = True
            raise shared


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
