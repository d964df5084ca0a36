"""A real SLURM cluster of two virtual machines: srun, and launch/slurm.sbatch with its signal and its way back."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.runs import ROOT, metrics
from tests.multinode import jobs, slurm
from tests.multinode.conftest import STEPS
from tests.multinode.lab import Lab, missing, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing(*slurm.PROGRAMS):
        pytest.skip(reason)
    with Lab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab, slurm.start(lab)


def test_srun_trains_as_two_local_ranks(cluster, local_losses):
    lab, env = cluster
    preset = jobs.write_inputs(lab, max_steps=STEPS)
    command = ["srun", "--nodes=2", "--ntasks=2", sys.executable, *jobs.program(lab.work / "srun", preset)]
    code, output = lab.run("node1", command, **env)
    print(output)
    assert code == 0
    assert metrics(lab.files("node1") / "srun", "step", "loss", "grad_norm", "val_loss") == local_losses


def test_the_batch_script_saves_before_the_limit_and_goes_back_into_the_queue(cluster):
    lab, env = cluster
    preset = jobs.write_inputs(lab, max_steps=100_000, save_every=5, eval_every=1000, decay_share=0.0)
    run_dir = lab.work / "batch"
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    for theirs, ours in (("--gpus-per-node=2", "--exclusive"), ("--cpus-per-task=14", "--cpus-per-task=1"),
                         ("--ntasks-per-node=2", "--ntasks-per-node=1")):  # fmt: skip
        assert theirs in script
        script = script.replace(f"#SBATCH {theirs}", f"#SBATCH {ours}")
    (lab.files("node1") / "slurm.sbatch").write_text(script)
    env = {**env, "RUN_DIR": str(run_dir), "TBF_PYTHON": sys.executable, "TBF_CACHE": str(lab.work / "cache")}
    options = [f"--chdir={ROOT}", f"--output={lab.work}/job.log", "--parsable"]
    submit = ["sbatch", *options, lab.work / "slurm.sbatch", *jobs.program("", preset)[1:5]]
    code, job = lab.run("node1", ["sh", "-c", f"cd {ROOT} && {' '.join(map(str, submit))}"], **env)
    assert code == 0, job
    job, log = job.strip(), lab.files("node1") / "job.log"

    def saved():
        return list((lab.files("node2") / "batch" / "checkpoints").glob("step-*/manifest.json"))

    until(saved, 240, f"a checkpoint ({log.read_text()[-2000:] if log.exists() else 'no log'})")
    assert lab.run("node1", ["scancel", "--signal=USR1", job], **env)[0] == 0
    until(lambda: log.exists() and "the run is stopped" in log.read_text(), 120, "the end of the script")
    print(log.read_text()[-1500:])

    def requeued():
        return "Restarts=1" in lab.run("node1", ["scontrol", "show", "job", job], **env)[1]

    until(requeued, 60, "the job's return to the queue")
    assert (lab.files("node2") / "cache" / "tbf" / "shards").exists() or (lab.files("node2") / "data").exists()
    lab.run("node1", ["scancel", job], **env)
