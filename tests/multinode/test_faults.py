"""What goes wrong between machines: each fault ends in one clear line, an exit code, and no process left anywhere."""

from __future__ import annotations

import json

import pytest

from tests.multinode import jobs
from tests.multinode.lab import Lab, missing, until

pytestmark = pytest.mark.slow
LONG = {"max_steps": 100_000, "save_every": 5, "eval_every": 1000, "decay_share": 0.0, "stall_timeout_s": 8}


@pytest.fixture
def hosts(tmp_path):
    """Two fresh machines; their run folders are not shared."""
    if reason := missing():
        pytest.skip(reason)
    with Lab(tmp_path) as machines:
        yield machines


def checkpoints(lab, host="node1"):
    found = (lab.files(host) / "run" / "checkpoints").glob("step-*/manifest.json")
    return sorted(int(path.parent.name[5:]) for path in found)


def until_saved(lab, job, after=0):
    def saved():
        assert any(p.poll() is None for p in job.processes.values()), job.output[-4000:]
        return all(checkpoints(lab, host) and checkpoints(lab, host)[-1] > after for host in lab.hosts)

    return until(saved, 240, "a checkpoint")


def until_gone(lab, seconds=90):
    def gone():
        return not any(lab.processes(host, str(jobs.TRAIN)) for host in lab.hosts)

    return until(gone, seconds, f"the end of {[lab.processes(host, str(jobs.TRAIN)) for host in lab.hosts]}")


def errors(job):
    return [line for line in job.output.splitlines() if "error: " in line]


def status(lab, host="node1"):
    return json.loads((lab.files(host) / "run" / "run_status.json").read_text())


def test_a_pulled_cable_is_named_on_both_sides_and_training_goes_on_after_a_restart(hosts):
    preset = jobs.write_inputs(hosts, **LONG)
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset))
    until_saved(hosts, job)
    hosts.unplug("node2")
    seconds = until_gone(hosts)
    codes = job.wait(60)
    print(f"{seconds:.1f} s to the end on both machines; exit codes {codes}", *errors(job), sep="\n")
    assert 0 not in codes.values()
    assert status(hosts)["state"] == "failed" and "rank 1 (pid" in status(hosts)["reason"]
    assert any("rank 0 (pid" in line and "or the network to it is down" in line for line in errors(job))

    hosts.plug("node2")
    last = checkpoints(hosts)[-1]
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset, "--max-steps", last + 3))
    assert set(job.wait().values()) == {0}, job.output[-3000:]
    assert f"resumed from latest at step {last}" in job.output
    assert status(hosts)["state"] == "done"


def test_a_machine_that_dies_before_the_meeting_is_named(hosts):
    preset = jobs.write_inputs(hosts, max_steps=6)
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset), env=["TBF_JOIN_TIMEOUT=5"], only="node1")
    codes = job.wait(120)
    print(codes, *errors(job), sep="\n")
    assert codes["node1"] != 0 and len(errors(job)) == 1
    assert "only 1 of 2 ranks joined at node1:29500" in errors(job)[0] and "no sign of rank 1" in errors(job)[0]
    until_gone(hosts, 30)


def test_another_seed_on_one_machine_ends_all_with_one_line(hosts):
    preset = jobs.write_inputs(hosts, max_steps=6)
    path = hosts.files("node2") / "tiny.yaml"
    path.write_text(path.read_text().replace("train:\n", "train:\n  seed: 5\n"))
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset))
    codes = job.wait(120)
    print(codes, *errors(job), sep="\n")
    assert 0 not in codes.values()
    assert len(errors(job)) == 1 and "in its settings: train.seed 5 there" in errors(job)[0]
    until_gone(hosts, 30)
    assert not (hosts.files("node1") / "run").exists()


def test_a_machine_that_stands_twice_in_the_hostfile_starts_nothing(hosts):
    if reason := missing("sshd", "pdsh"):
        pytest.skip(reason)
    preset = jobs.write_inputs(hosts, max_steps=6)
    (hosts.files("node1") / "hostfile").write_text("node1 slots=1\nnode1 slots=1\n")
    job = jobs.pdsh(hosts, jobs.program(hosts.work / "run", preset))
    assert job.wait(120)["node1"] != 0 and "multiple entries for node1" in job.output.splitlines()[-1]
    until_gone(hosts, 30)
