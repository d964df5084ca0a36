"""What the operating system is asked."""

import sys

import numpy as np
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
    np.ones(60_000_000 // 8).sum()
    before = reset_peak()
    assert peak_memory() - before < 5_000_000
    np.ones(40_000_000 // 8).sum()
    assert 30_000_000 < peak_memory() - before < 55_000_000
