from __future__ import annotations

import pytest

from tests.helpers.runs import metrics, train, write_preset
from tests.multinode.lab import Lab, missing

STEPS = 6


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Two machines with a fast network between them."""
    if reason := missing():
        pytest.skip(reason)
    with Lab(tmp_path_factory.mktemp("lab")) as machines:
        yield machines


@pytest.fixture
def hosts(tmp_path):
    """Two fresh machines; their run folders are not shared."""
    if reason := missing():
        pytest.skip(reason)
    with Lab(tmp_path) as machines:
        yield machines


@pytest.fixture
def hosts_with_ssh(hosts):
    if reason := missing("sshd", "pdsh"):
        pytest.skip(reason)
    return hosts


@pytest.fixture(scope="session")
def local_losses(tmp_path_factory):
    """Losses of two ranks on one machine, as texts."""
    cache = tmp_path_factory.mktemp("local")
    preset = write_preset(cache, max_steps=STEPS)
    train("--preset", preset, "--run-dir", cache / "run", cache=cache, ranks=2)
    return metrics(cache / "run", "step", "loss", "grad_norm", "val_loss")
