"""Settings that every test shares. They must be in place before torch or DeepSpeed is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TBF_CHECK_CACHE", "1")  # every use of cached ternary weights is compared with a fresh one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with corpora that are too large for the repository; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("TBF_TEST_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set TBF_TEST_DATA")
    return folder
