"""What happens to a run on its way: cables, power and slow machines. It ends with names and can go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from tests.multinode import jobs
from tests.multinode.lab import until

pytestmark = pytest.mark.slow
LONG = {"max_steps": 100_000, "save_every": 5, "eval_every": 1000, "decay_share": 0.0, "stall_timeout_s": 8}


def resume(lab, preset):
    """Three more steps on both hosts, from the newest checkpoint."""
    last = jobs.checkpoints(lab)[-1]
    job = jobs.no_ssh(lab, jobs.program(lab.work / "run", preset, "--max-steps", last + 3))
    assert set(job.wait().values()) == {0}, job.output[-3000:]
    assert f"resumed from latest at step {last}" in job.output
    assert jobs.status(lab)["state"] == "done"


def test_a_pulled_cable_is_named_on_both_sides_and_training_goes_on_after_a_restart(hosts):
    preset = jobs.write_inputs(hosts, **LONG)
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset))
    jobs.until_saved(hosts, job)
    hosts.unplug("node2")
    seconds = jobs.until_gone(hosts)
    codes = job.wait(60)
    print(f"{seconds:.1f} s to the end on both machines; exit codes {codes}", *job.errors, sep="\n")
    assert 0 not in codes.values()
    assert jobs.status(hosts)["state"] == "failed" and "rank 1 (pid" in jobs.status(hosts)["reason"]
    assert any("rank 0 (pid" in line and "or the network to it is down" in line for line in job.errors)
    hosts.plug("node2")
    resume(hosts, preset)


def test_a_supervised_run_outlives_a_pulled_cable(hosts_with_ssh):
    hosts = hosts_with_ssh
    preset = jobs.write_inputs(hosts, **LONG)
    command = [sys.executable, jobs.TRAIN, "--auto-restart", 20, "--restart-pause", 1, "--launcher",
               "deepspeed --hostfile hostfile", *jobs.program(hosts.work / "run", preset)[1:]]  # fmt: skip
    job = jobs.Job(hosts, {"node1": command})
    jobs.until_saved(hosts, job)
    hosts.unplug("node2")
    seconds = until(lambda: "supervisor: the run failed at step" in job.output, 120, "the supervisor's notice")
    hosts.plug("node2")
    seconds_back = jobs.until_saved(hosts, job, after=jobs.checkpoints(hosts)[-1])
    for pid in hosts.pids("node1", "--auto-restart"):
        os.kill(pid, signal.SIGTERM)
    codes = job.wait(120)
    said = [line for line in job.output.splitlines() if "supervisor:" in line or "error: " in line]
    print(f"noticed after {seconds:.1f} s, a new checkpoint {seconds_back:.1f} s later, {codes}", *said, sep="\n")
    print(jobs.status(hosts))
    assert codes["node1"] == 128 + signal.SIGTERM
    jobs.until_gone(hosts)
    restarts = [line for line in said if "restart " in line]
    assert said[-1] not in restarts  # what a person ends stays ended


def test_a_machine_that_loses_its_power_is_named_and_can_come_back(hosts_with_ssh):
    hosts = hosts_with_ssh
    preset = jobs.write_inputs(hosts, **LONG)
    job = jobs.pdsh(hosts, jobs.program(hosts.work / "run", preset), env=jobs.KEEPALIVE)
    jobs.until_saved(hosts, job)
    hosts.power_off("node2")
    seconds = jobs.until_gone(hosts, 90, ["node1"])
    codes = job.wait(60)
    print(f"{seconds:.1f} s to the end on node1, {codes}", *job.errors, sep="\n")
    assert codes["node1"] != 0 and "rank 1 (pid" in jobs.status(hosts)["reason"]
    hosts.power_on("node2")
    resume(hosts, preset)


def test_a_slow_machine_is_named(hosts):
    preset = jobs.write_inputs(hosts, **{**LONG, "stall_timeout_s": 60})
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset))
    jobs.until_saved(hosts, job)
    slow, stop = hosts.pids("node2", f"-u {jobs.TRAIN}"), threading.Event()
    assert slow

    def hold_back():
        """Lets node2's rank run a tenth of the time."""
        while not stop.is_set():
            for number, seconds in ((signal.SIGSTOP, 0.09), (signal.SIGCONT, 0.01)):
                for pid in slow:
                    os.kill(pid, number)
                time.sleep(seconds)

    thread = threading.Thread(target=hold_back)
    thread.start()
    try:
        seconds = until(lambda: "rank 1 on node2 is slow" in job.output, 120, "the straggler's name")
    finally:
        stop.set()
        thread.join()
    line = next(line for line in job.output.splitlines() if "is slow" in line)
    print(f"named after {seconds:.1f} s", line, sep="\n")
    assert "rank 0 on node1 is slow" not in job.output
