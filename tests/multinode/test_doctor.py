"""`tbf doctor --hostfile` on machines and a cable that are known: it has to find what was built in."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pytest

from tests.helpers.runs import ROOT
from tests.multinode import jobs
from tests.multinode.lab import Cable, Lab, missing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if reason := missing("sshd", "pdsh"):
        pytest.skip(reason)
    with Lab(tmp_path_factory.mktemp("doctor"), cable=Cable(delay=0.02, rate=100e6)) as machines:
        jobs.write_inputs(machines)
        data = machines.files("node1") / "data"
        program = [sys.executable, "-m", "tbf.cli", "data", "prepare", "sample", "--vocab-size", "500", "--out", data]
        code, output = machines.run("node1", ["env", f"PYTHONPATH={ROOT}", *program])
        assert code == 0, output
        machines.run("node2", ["cp", "-r", data, machines.work / "data"])
        yield machines


def findings(lab):
    line = [sys.executable, "-m", "tbf.cli", "doctor", "--hostfile", lab.work / "hostfile", "--data", lab.work / "data",
            "--no-kernels", "--json"]  # fmt: skip
    shell = f"cd {ROOT} && {' '.join(map(str, line))}"
    code, output = lab.run("node1", ["sh", "-c", shell], timeout=300)
    print(output)
    found = json.loads(output[output.index("{\n") :])["findings"]
    return code, {f["name"]: f for f in found}, [f["seen"] for f in found if f["name"] == "host"]


def test_the_cable_is_measured_and_the_data_compared(lab):
    _, found, hosts = findings(lab)
    assert len(hosts) == 2 and all("reachable, same versions" in seen for seen in hosts)
    assert found["data"]["status"] == "green" and "the same on 2 machine(s)" in found["data"]["seen"]
    network = found["network"]
    assert network["status"] == "yellow" and "node1 by eth0, node2 by eth0" in network["seen"]
    gigabits, milliseconds = map(float, re.search(r"([\d.]+) Gbit/s .* takes ([\d.]+) ms", network["seen"]).groups())
    assert 0.05 <= gigabits <= 0.1
    assert 20.0 <= milliseconds < 35.0


def test_a_taken_port_and_other_data_are_red(lab):
    shard = next((lab.files("node2") / "data").glob("shard-*.bin"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    listen = "import socket, time; s = socket.create_server(('', 29500)); print('listening', flush=True)"
    assert lab.start("node1", [sys.executable, "-c", f"{listen}; time.sleep(300)"]).stdout.readline() == "listening\n"
    try:
        code, found, _ = findings(lab)
    finally:
        for pid in lab.pids("node1", "create_server"):
            os.kill(pid, signal.SIGKILL)
        shard.write_bytes(content)
    assert code == 5
    assert found["network"]["status"] == "red" and "node1 cannot listen on port 29500" in found["network"]["seen"]
    assert found["data"]["status"] == "red" and "is missing or cut short" in found["data"]["seen"]
