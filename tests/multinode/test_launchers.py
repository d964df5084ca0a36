"""The real launchers over real ssh: two machines with a rank each train exactly as two ranks of one machine."""

from __future__ import annotations

import pytest

from tests.helpers.runs import metrics
from tests.multinode import jobs
from tests.multinode.conftest import STEPS
from tests.multinode.lab import missing

slow = pytest.mark.slow
LAUNCHERS = [
    pytest.param(jobs.pdsh, ("sshd", "pdsh"), id="pdsh"),
    pytest.param(jobs.no_ssh, (), id="no_ssh", marks=slow),
    pytest.param(jobs.torchrun, (), id="torchrun", marks=slow),
    pytest.param(jobs.openmpi, ("sshd", "mpirun"), id="openmpi", marks=slow),
]


@pytest.mark.parametrize(("launcher", "programs"), LAUNCHERS)
def test_two_machines_train_as_two_local_ranks(lab, local_losses, launcher, programs):
    if reason := missing(*programs):
        pytest.skip(reason)
    preset = jobs.write_inputs(lab, max_steps=STEPS)
    run_dir = lab.folder / f"shared-{launcher.__name__}"
    job = launcher(lab, jobs.program(run_dir, preset))
    codes = job.wait()
    print(job.output)
    assert set(codes.values()) == {0}
    assert metrics(run_dir, "step", "loss", "grad_norm", "val_loss") == local_losses
    assert not any(lab.processes(host, str(jobs.TRAIN)) for host in lab.hosts)
