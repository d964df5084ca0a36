from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tbf.export.stored import release, stored

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are released on Linux only")


def resident_kib() -> int:
    """Pages of files that this process holds."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("RssFile")).split()[1])


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    torch.save({"pad": torch.zeros(3), "w": torch.arange(8_000_000).float().view(2000, 4000)}, tmp_path / "x.pt")
    return torch.load(tmp_path / "x.pt", mmap=True)["w"]


def test_reading_a_stored_tensor_keeps_none_of_its_pages(mapped: torch.Tensor) -> None:
    before = resident_kib()
    copy = stored(mapped).read()
    assert resident_kib() - before < 4_000  # of 32,000
    assert torch.equal(copy, mapped)  # the pages come back
    assert resident_kib() - before > 28_000


def test_a_part_is_released_without_its_neighbours(mapped: torch.Tensor) -> None:
    expected = mapped.clone()
    release(mapped.view(-1)[3_000_001:5_000_003])
    assert torch.equal(mapped, expected)


def test_ordinary_memory_is_left_alone() -> None:
    value = torch.arange(2_000_000).float()
    release(value)
    release(value[5:])
    release(value.view(1000, 2000).T)
    release(torch.empty(0))
    assert torch.equal(value, torch.arange(2_000_000).float())
