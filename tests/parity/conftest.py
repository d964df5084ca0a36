"""Each parity test measures one error, holds it to its tolerance and records both for `benchmarks/parity.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Measured = Callable[..., None]


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Called as measured(row, what, against, error, tolerance): records a line of the table and checks it."""

    def record(row: int, what: str, against: str, error: float, tolerance: float) -> None:
        for name, value in (("row", row), ("what", what), ("against", against), ("tolerance", tolerance)):
            record_property(name, value)
        record_property("error", float(error))
        assert error <= tolerance

    return record


def relative(got: Tensor, reference: Tensor) -> float:
    """|got - reference| / |reference|, in FP64."""
    got, reference = got.detach().double(), reference.detach().double()
    return ((got - reference).norm() / reference.norm()).item()


def absolute(got: Tensor, reference: Tensor) -> float:
    """The largest difference."""
    return (got.detach().double() - reference.detach().double()).abs().max().item()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
