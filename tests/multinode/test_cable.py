"""A long, thin cable between the machines: slower, and not one bit otherwise."""

from __future__ import annotations

import pytest

from tests.helpers.runs import metrics
from tests.multinode import jobs
from tests.multinode.conftest import STEPS
from tests.multinode.lab import Cable, Lab, missing

pytestmark = pytest.mark.slow


def test_20_ms_and_100_mbit_change_no_loss(tmp_path, local_losses):
    if reason := missing():
        pytest.skip(reason)
    with Lab(tmp_path, cable=Cable(delay=0.02, rate=100e6)) as lab:
        preset = jobs.write_inputs(lab, max_steps=STEPS)
        job = jobs.no_ssh(lab, jobs.program(lab.work / "run", preset))
        assert set(job.wait(240).values()) == {0}, job.output[-3000:]
        found = metrics(lab.files("node1") / "run", "step", "loss", "grad_norm", "val_loss")
    assert found == local_losses
