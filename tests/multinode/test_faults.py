"""What is wrong from the start: each fault ends in one clear line, an exit code, and no process left anywhere."""

from __future__ import annotations

import sys

import pytest

from tests.multinode import jobs
from tests.multinode.lab import until

slow = pytest.mark.slow
SOON = ["TBF_JOIN_TIMEOUT=5"]


def ended(job, hosts, *words, lines=1):
    """Waits for the end; the `error: ` lines are so many and the first has the words, and nothing is left anywhere."""
    codes = job.wait(180)
    seconds = jobs.until_gone(hosts, 30)
    print(codes, f"all gone {seconds:.1f} s later", *job.errors, sep="\n")
    assert 0 not in codes.values(), job.output[-3000:]
    assert len(job.errors) == lines, job.output[-3000:]
    assert all(word in job.errors[0] for word in words)
    assert not (hosts.files("node1") / "run").exists()
    return job.errors


def test_a_half_set_environment_is_named(hosts):
    preset = jobs.write_inputs(hosts, max_steps=6)
    for host, env in (("node1", {"RANK": "0"}), ("node2", {"WORLD_SIZE": "2"})):
        job = [sys.executable, *jobs.program(hosts.work / "run", preset)]
        code, output = hosts.run(host, job, **env)
        assert code == 2 and output.startswith("error: the environment is half set: ") and output.count("\n") == 1
    jobs.until_gone(hosts, 5)


@slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lab: (lab.files("node2") / "tiny.yaml").unlink(), ("tiny.yaml", "(on rank 1, node2)")),
        (lambda lab: other_seed(lab), ("in its settings: train.seed 5 there",)),
        (lambda lab: other_release(lab), ("in its versions: deepspeed 9.9 there", "make setup")),
        (lambda lab: other_text(lab), ("rank 1 on node2 has another",)),
    ],
    ids=["no preset", "another seed", "another release", "another text"],
)
def test_what_differs_between_machines_ends_all_with_one_line(hosts, change, words):
    preset = jobs.write_inputs(hosts, max_steps=6)
    for host in hosts.hosts:
        (hosts.files(host) / "text.txt").write_text(text("el sol sale por el este"))
    change(hosts)
    program = jobs.program(hosts.work / "run", preset, "--data", hosts.work / "text.txt")
    job = jobs.no_ssh(hosts, program, env=[f"PYTHONPATH={hosts.work / 'packages'}"])
    ended(job, hosts, *words)


def text(saying):
    return "".join(f"El día {day} {saying} y el río va al mar.\n\n" for day in range(400))


def other_seed(lab):
    path = lab.files("node2") / "tiny.yaml"
    path.write_text(path.read_text().replace("train:\n", "train:\n  seed: 5\n"))


def other_release(lab):
    """Of DeepSpeed, as far as its package's own description says."""
    folder = lab.files("node2") / "packages" / "deepspeed-9.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.9\n")


def other_text(lab):
    (lab.files("node2") / "text.txt").write_text(text("la luna ilumina el camino"))


@slow
def test_other_slots_on_one_machine_are_named(hosts):
    preset = jobs.write_inputs(hosts, max_steps=6)
    (hosts.files("node1") / "hostfile").write_text("node1 slots=1\nnode2 slots=2\n")
    ended(jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset)), hosts, "rank 1 on node2 counts 2 ranks", "3")


@slow
def test_a_machine_that_never_comes_is_named(hosts):
    preset = jobs.write_inputs(hosts, max_steps=6)
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset), env=SOON, only="node1")
    ended(job, hosts, "only 1 of 2 ranks joined at node1:29500", "no sign of rank 1 (node2)")


@slow
def test_a_first_machine_that_never_comes_is_named(hosts):
    preset = jobs.write_inputs(hosts, max_steps=6)
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset), env=SOON, only="node2")
    ended(job, hosts, "rank 1 on node2 cannot reach rank 0 at node1:29500")


@slow
def test_a_port_that_another_program_has_is_named(hosts):
    preset = jobs.write_inputs(hosts, max_steps=6)
    listen = "import socket, time; s = socket.create_server(('', 29500)); print('listening', flush=True)"
    listener = hosts.start("node1", [sys.executable, "-c", f"{listen}; time.sleep(300)"])
    assert listener.stdout.readline() == "listening\n"
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset), env=SOON)
    lines = ended(job, hosts, lines=2)
    assert "cannot listen on port 29500" in lines[0] and "cannot reach rank 0" in lines[1]


@slow
def test_a_port_that_an_earlier_run_has_is_named_on_both_machines(hosts):
    preset = jobs.write_inputs(hosts, max_steps=100_000, save_every=5, decay_share=0.0)
    earlier = jobs.no_ssh(hosts, jobs.program(hosts.work / "run", preset))
    jobs.until_saved(hosts, earlier)
    job = jobs.no_ssh(hosts, jobs.program(hosts.work / "other", preset))
    codes = job.wait(120)
    print(codes, *job.errors, sep="\n")
    assert 0 not in codes.values() and len(job.errors) == 2
    assert "cannot listen on port 29500" in job.errors[0]
    assert "there is a rank 1 at node1:29500 already: an earlier run" in job.errors[1]
    jobs.until_saved(hosts, earlier, after=jobs.checkpoints(hosts)[-1])  # undisturbed


@slow
@pytest.mark.parametrize(
    ("hostfile", "words"),
    [
        ("node1 slots=1\nnode1 slots=1\n", "multiple entries for node1"),
        ("node1 slots=one\n", "bad entry"),
        ("node7 slots=1\nnode1 slots=1\n", "node7"),
    ],
    ids=["twice", "no number", "unknown first"],
)
def test_a_bad_hostfile_starts_nothing(hosts_with_ssh, hostfile, words):
    hosts = hosts_with_ssh
    preset = jobs.write_inputs(hosts, max_steps=6)
    (hosts.files("node1") / "hostfile").write_text(hostfile)
    job = jobs.pdsh(hosts, jobs.program(hosts.work / "run", preset))
    codes = job.wait(120)
    print(codes, job.output[-600:])
    assert codes["node1"] != 0 and words in job.output.splitlines()[-1]
    jobs.until_gone(hosts, 30)


@slow
@pytest.mark.parametrize("fault", ["unknown", "without power", "loses its power"])
def test_a_machine_that_ssh_cannot_reach_is_named_early(hosts_with_ssh, fault):
    hosts = hosts_with_ssh
    preset = jobs.write_inputs(hosts, max_steps=6)
    with (hosts.files("node1") / ".deepspeed_env").open("a") as variables:
        variables.write("TBF_JOIN_TIMEOUT=30\n")  # the notice comes after 20 s
    other = "node7" if fault == "unknown" else "node2"
    (hosts.files("node1") / "hostfile").write_text(f"node1 slots=1\n{other} slots=1\n")
    if fault == "without power":
        hosts.power_off("node2")
    job = jobs.pdsh(hosts, jobs.program(hosts.work / "run", preset), env=jobs.KEEPALIVE)
    if fault == "loses its power":
        until(lambda: hosts.processes("node2", "deepspeed.launcher.launch"), 60, "the start on node2")
        hosts.power_off("node2")
    codes = job.wait(180)
    said = [line for line in job.output.splitlines() if "waiting: no sign" in line]
    print(codes, *said, *job.errors, sep="\n")
    assert codes["node1"] != 0 and len(said) == 1 and len(job.errors) == 1
    assert f"no sign yet of rank 1 ({other}" in said[0] and f"no sign of rank 1 ({other}" in job.errors[0]
    assert ("does not resolve" in said[0]) == (fault == "unknown")
    jobs.until_gone(hosts, 30, ["node1"])
