"""The state of every random generator of this process, as tensors and numbers that load without pickle."""

from __future__ import annotations

import io
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def capture_rng() -> dict[str, Any]:
    """Returns the states of torch (host and current CUDA device), numpy and Python's `random`."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (libraries draw from it)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `capture_rng` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    elif (state["cuda"] is None) == torch.cuda.is_available():
        logger.warning("the checkpoint comes from another kind of device: the device's random state starts afresh")
    numpy = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (numpy["name"], numpy["keys"].numpy().astype(np.uint32), numpy["position"], numpy["has_gauss"], numpy["gauss"])
    )
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))


def rng_bytes() -> bytes:
    """The captured state as a torch file."""
    buffer = io.BytesIO()
    torch.save(capture_rng(), buffer)
    return buffer.getvalue()


def load_rng(path: Path) -> None:
    """Restores the state that a file of `rng_bytes` holds."""
    restore_rng(torch.load(path, map_location="cpu", weights_only=True))
