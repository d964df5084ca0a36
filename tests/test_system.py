"""What the operating system is asked."""

import mmap
import sys

import pytest

from tbf.system import cache_root, peak_memory, reset_peak


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "tbf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "tbf"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_starts_again():
    touch(80 << 20)
    before = reset_peak()
    assert peak_memory() - before < 30 << 20
    touch(60 << 20)
    assert 40 << 20 < peak_memory() - before < 80 << 20


def touch(count: int) -> None:
    """Makes `count` bytes resident and gives them back at once, past the allocator."""
    with mmap.mmap(-1, count) as block:
        for page in range(0, count, mmap.PAGESIZE):
            block[page] = 1
