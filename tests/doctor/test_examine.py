"""Machines that nobody here has, and what the doctor says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tbf.doctor import examine as examination
from tbf.doctor.examine import CHECKS, examine
from tbf.doctor.finding import GREEN, RED, YELLOW, count, to_dict
from tbf.doctor.machine import GIB, Answer, DiskSpeed, Memory, Operators
from tbf.doctor.options import Options
from tbf.errors import ConfigError, HardwareError
from tests.doctor.fake_machine import (
    CUDA_126,
    CUDA_130,
    P40,
    RTX,
    VERSIONS,
    FakeMachine,
    host_answer,
    link_answer,
    torch_of,
)

PLAIN = Options()
NVME = Options(nvme=Path("/mnt/nvme"))


def sick(machine: FakeMachine, options: Options = PLAIN) -> dict[str, tuple[str, str, str]]:
    """(status, seen, cure) of all that isn't green, by name."""
    found = [f for f in examine(machine, options) if f.status != GREEN]
    assert all(f.cure for f in found), "everything that isn't green names its cure"
    assert len({f.name for f in found}) == len(found)
    return {f.name: (f.status, f.seen, f.cure) for f in found}


def expect(machine: FakeMachine, name: str, status: str, *words: str, options: Options = PLAIN) -> None:
    """Exactly one complaint, of this status, and its line has the words."""
    found = sick(machine, options)
    assert set(found) == {name}, found
    assert found[name][0] == status
    for word in words:
        assert word in " -> ".join(found[name][1:])


def test_a_p40_with_the_right_torch_is_healthy():
    findings = list(examine(FakeMachine(), Options()))
    assert count(findings) == {RED: 0, YELLOW: 0, GREEN: len(findings)}
    seen = {finding.name: finding for finding in findings}
    assert seen["torch kernels"].seen == "carried for Tesla P40 (sm_61)"
    assert seen["driver"].seen == "580.95.05, R580 is the last for these cards: do not upgrade past it"
    assert seen["card 0"].seen == (
        "Tesla P40, capability 6.1, 24.0 GiB, 0.0 in use, ECC on, 40 °C, PCIe x16 generation 3"
    )
    assert seen["kernels"].detail == "the table"
    assert json.loads(json.dumps(to_dict(findings)))["count"]["green"] == len(findings)


def test_a_machine_without_a_card_is_healthy_too():
    machine = FakeMachine([], torch_of(cuda=None, cards=0, nccl=None), None, nvrtc_version=None)
    findings = list(examine(machine, Options()))
    assert {finding.status for finding in findings} == {GREEN}
    names = {finding.name for finding in findings}
    assert not names & {"torch kernels", "nccl", "nvrtc", "CUDA toolkit", "sensors"} and "kernels" in names


@pytest.mark.parametrize("architectures", [CUDA_130, ("compute_60",), ("sm_75", "compute_60")])
def test_a_torch_without_kernels_for_pascal_names_the_release(architectures):
    expect(FakeMachine(torch_built=torch_of(*architectures)), "torch kernels", RED, "Tesla P40 (sm_61)",
           "torch 2.14.1 from PyTorch's CUDA 12.6 (cu126) wheel index, or torch 2.7.1",
           *(["PTX only"] if "compute_60" in architectures else []))  # fmt: skip


def test_no_kernels_for_a_new_card_asks_for_a_new_torch():
    new = replace(RTX, capability=(13, 0))
    expect(FakeMachine([new], torch_of(*CUDA_130)), "torch kernels", RED, "a torch build for this card")


def test_drivers():
    none = FakeMachine([], torch_of(cards=0), None, on_bus=2)
    found = sick(none)
    assert found["driver"][0] == RED and "2 NVIDIA card(s) on the bus and no driver" in found["driver"][1]
    assert set(found) == {"driver", "torch"}  # torch sees none of them, either
    assert not sick(replace(none, variables={"DS_ACCELERATOR": "cpu"})).keys() & {"driver"}
    assert not sick(FakeMachine(driver_release=None))  # under WSL only torch knows of the card
    expect(FakeMachine(driver_release="590.44"), "driver", RED, "Tesla P40", "install R580")
    lost = sick(FakeMachine([], torch_of(*CUDA_126, cards=0), "590.44", on_bus=1))
    assert "does not carry 1 of 1 card(s)" in lost["driver"][1]
    expect(FakeMachine(driver_release="470.82"), "driver", RED, "too old for torch's CUDA 12.6", "R525")
    assert not sick(FakeMachine([RTX], torch_of(*CUDA_130, cuda="13.0"), "595.10", plan="by cuda_int_mm"))


def test_what_torch_sees():
    expect(FakeMachine(torch_built=torch_of(cuda=None, cards=0)), "torch", RED, "is a CPU build beside 1 card(s)")
    expect(FakeMachine(torch_built=torch_of(*CUDA_126, cards=0)), "torch", RED, "sees 0 of 1 card(s)")
    two = FakeMachine([P40, P40], torch_of(*CUDA_126), variables={"CUDA_VISIBLE_DEVICES": "0"})
    expect(two, "torch", YELLOW, "CUDA_VISIBLE_DEVICES=0")
    hidden = FakeMachine(torch_built=torch_of(*CUDA_126, cards=0), variables={"CUDA_VISIBLE_DEVICES": ""})
    expect(hidden, "torch", RED, "CUDA_VISIBLE_DEVICES=", "unset")


def test_two_different_cards():
    small = replace(RTX, name="NVIDIA GeForce GTX 1080 Ti", capability=(6, 1), memory=11 * GIB)
    machine = FakeMachine([P40, small], torch_of(*CUDA_126, cards=2))
    expect(machine, "unequal cards", YELLOW, "11.0 GiB", "CUDA_VISIBLE_DEVICES")
    machine.torch_built = torch_of(*CUDA_126, cards=2, nccl=None)
    assert sick(machine)["nccl"][0] == RED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 88}, "88 °C"),
        ({"lanes": 4}, "x4 of x16 lanes"),
        ({"used": 3 * GIB}, "another program holds 3.0 GiB"),
        ({"memory_errors": 2}, "2 uncorrected memory error(s)"),
    ],
)
def test_the_state_of_a_card(change, words):
    expect(FakeMachine([replace(P40, **change)]), "card 0", YELLOW, words)


def test_sensors_and_nvrtc():
    expect(FakeMachine(sensors=False), "sensors", YELLOW, "nvidia-ml-py")
    expect(FakeMachine(nvrtc_version=None), "nvrtc", YELLOW, "nvidia-cuda-nvrtc-cu12==12.6.85")
    expect(FakeMachine(nvrtc_version="13.0"), "nvrtc", YELLOW, "13.0 cannot compile for Tesla P40")
    turing = FakeMachine([RTX], torch_of(*CUDA_130), nvrtc_version="13.0")
    assert not sick(turing)


def test_ternary_kernels():
    slow = "forward by fp32, FP32 gradients"
    expect(FakeMachine(plan=slow), "kernels", YELLOW, "tbf bench gemm")
    expect(FakeMachine(plan=HardwareError("can't serve")), "kernels", RED, "card 0: can't serve")
    expect(FakeMachine(plan=RuntimeError("CUDA error\nmore")), "kernels", RED, "card 0: CUDA error")
    assert not sick(FakeMachine(plan=slow), Options(kernels=False))


def test_building():
    expect(FakeMachine(programs=("ninja",)), "compiler", YELLOW, "none of g++, clang++, c++", "build-essential")
    broken = FakeMachine(answers=lambda command: Answer(1, "cannot execute cc1plus"))
    expect(broken, "compiler", YELLOW, "cannot execute cc1plus")
    expect(FakeMachine(variables={"CXX": "g++-9 -m64"}), "compiler", YELLOW, "none of g++-9 -m64")
    expect(FakeMachine(programs=("g++",)), "ninja", YELLOW, "pip install ninja")
    machine = FakeMachine(operators_found=Operators("~/x", (), ()))
    expect(machine, "host Adam", YELLOW, "not compiled yet in ~/x", "--build")
    assert not sick(machine, Options(build=True))
    machine.adam = "cpu_adam: the build failed (omp.h: No such file)"
    expect(machine, "host Adam", YELLOW, "omp.h: No such file", options=Options(build=True))


def test_stale_locks_of_builds():
    locks = (("~/x/cpu_adam/lock", 7200.0), ("~/x/async_io/lock", 5.0))
    machine = FakeMachine(operators_found=Operators("~/x", ("cpu_adam",), locks))
    expect(machine, "build locks", YELLOW, "1 stale, the oldest 120 min", "rm ~/x/cpu_adam/lock")
    machine.operators_found = Operators("~/x", ("cpu_adam",), locks[1:])
    assert not sick(machine)


def test_nvme_offload_needs_more():
    machine = FakeMachine(aio=False, limits={"memlock": 64 << 10, "nofile": 65536}, speed=DiskSpeed(3e8, 4e8, True))
    assert not sick(machine)  # nobody asked for it
    found = sick(machine, NVME)
    assert {name: status for name, (status, *_) in found.items()} == {
        "libaio": RED, "CUDA toolkit": RED, "memlock": YELLOW, "NVMe": YELLOW,
    }  # fmt: skip
    assert "libaio-dev" in found["libaio"][2] and "ulimit -l unlimited" in found["memlock"][2]
    gone = FakeMachine(free=FileNotFoundError(2, "No such file or directory"))
    assert sick(gone, NVME)["NVMe"][:2] == (RED, "No such file or directory")


@pytest.mark.parametrize(("release", "fits"), [("12.4", True), ("13.0", False), (None, False)])
def test_the_cuda_toolkit_must_be_of_torchs_major(release, fits):
    machine = FakeMachine(
        programs=("g++", "ninja", "/opt/cuda/bin/nvcc"), variables={"CUDA_HOME": "/opt/cuda"},
        answers=lambda command: Answer(0, f"nvcc: release {release}, V{release}"),
    )  # fmt: skip
    assert not sick(machine)
    assert ("CUDA toolkit" in sick(machine, NVME)) is not fits


@pytest.mark.parametrize(
    ("change", "name", "status", "words"),
    [
        ({"shared": 64 << 20}, "/dev/shm", RED, "--shm-size"),
        ({"shared": 512 << 20}, "/dev/shm", YELLOW, "512 MiB"),
        ({"shared": None}, "/dev/shm", YELLOW, "missing"),
        ({"swapped": 7 * GIB}, "swap", YELLOW, "7.0 of 8.0 GiB in use"),
        ({"available": 4 * GIB}, "memory", YELLOW, "4.0 free"),
        ({"limit": 8 * GIB}, "memory", YELLOW, "this container may take 8.0"),
    ],
)
def test_memory(change, name, status, words):
    machine = FakeMachine()
    machine.host_memory = replace(machine.host_memory, **change)
    expect(machine, name, status, words)


def test_limits_disk_and_threads():
    assert not sick(FakeMachine(host_memory=Memory(128 * GIB, 120 * GIB, 0, 0, 256 * GIB, 64 * GIB)))
    expect(FakeMachine(limits={"memlock": None, "nofile": 1024}), "open files", YELLOW, "1,024", "ulimit -n 65536")
    expect(FakeMachine(speed=DiskSpeed(5e7, 9e8, False)), "disk", YELLOW, "0.05 GB/s", "synced")
    expect(FakeMachine(free=3 * GIB), "disk", YELLOW, "3 GiB free")
    expect(FakeMachine(free=PermissionError(13, "Permission denied")), "disk", YELLOW, "Permission denied")
    expect(FakeMachine(variables={"OMP_NUM_THREADS": "1"}), "processor", YELLOW, "OMP_NUM_THREADS=1", "unset")
    assert not sick(FakeMachine(variables={"OMP_NUM_THREADS": "1", "TBF_NUM_THREADS": "8"}))


def test_versions():
    old = FakeMachine(versions_found={**VERSIONS, "deepspeed": "0.19.7"})
    expect(old, "versions", RED, "deepspeed >= 0.19.8")
    expect(FakeMachine(versions_found={**VERSIONS, "deepspeed": None}), "versions", RED, "deepspeed missing")
    assert not sick(FakeMachine(versions_found={**VERSIONS, "torch": "2.14.1+cu126", "deepspeed": "0.20"}))


def test_what_joins_ranks():
    unreachable = RuntimeError("[enforce fail] connectFullMesh\nmore")
    expect(FakeMachine(gloo_error=unreachable), "gloo", RED, "connectFullMesh", "GLOO_SOCKET_IFNAME")
    expect(FakeMachine(taken=True), "port", YELLOW, "29500 is taken", "--master_port 29501")
    expect(FakeMachine(address=None), "own name", YELLOW, "does not resolve")
    assert not sick(FakeMachine(address="127.0.1.1", synchronised=False))  # matters between machines only


def hostfile(tmp_path: Path, text: str = "node1 slots=1\n# a comment\nnode2 slots=2  # two\n") -> Options:
    path = tmp_path / "hostfile"
    path.write_text(text, encoding="utf-8")
    return Options(hostfile=path)


def answering(versions: Answer, link: Answer | None = None, host: str = "") -> Callable[[Sequence[str]], Answer]:
    """Answers over ssh; `host` alone answers so, if it is named, and the others as if all were well."""

    def answer(command):
        if "ssh" not in command:
            return Answer(0, "g++")
        mine = host in ("", command[command.index("--") + 1])
        if "tbf.doctor.link" in command[-1]:
            return link if link and mine else link_answer()
        return versions if mine else host_answer(cards=2)

    return answer


def test_machines_of_a_hostfile(tmp_path):
    options = hostfile(tmp_path)
    machine = FakeMachine(answers=answering(host_answer(cards=2)))
    assert not sick(machine, options)
    ssh = [command for command in machine.commands if command[0] == "ssh"]
    assert [command[command.index("--") + 1] for command in ssh[:2]] == ["node1", "node2"]
    assert sorted(command[-1].partition("tbf.doctor.link ")[2] for command in ssh[2:]) == [
        "0 2 node1 29500", "1 2 node1 29500"
    ]  # fmt: skip
    assert all("BatchMode=yes" in command and "ConnectTimeout=5" in command for command in ssh)
    machine.address, machine.synchronised, machine.programs = "127.0.1.1", False, ("g++", "ninja")
    assert set(sick(machine, options)) == {"own name", "clock", "pdsh"}


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (Answer(255, "node2: Permission denied (publickey)."), RED, "ssh-copy-id"),
        (Answer(124, ""), RED, "no answer in time"),
        (Answer(1, "bash: cd: /srv/tbf: No such file or directory"), RED, "same path"),
        (Answer(0, '{"versions": 3}'), RED, "same path"),
        (host_answer({**VERSIONS, "torch": "2.7.1"}), RED, "torch 2.7.1 (here 2.14.1+cu126)"),
        (host_answer(cards=1), RED, "2 slots, but 1 card(s)"),
        (host_answer(cards=2, clock=3600), YELLOW, "its clock is 3"),
    ],
)
def test_a_machine_that_is_not_like_this_one(tmp_path, answer, status, words):
    machine = FakeMachine(answers=answering(answer, host="node2"))
    expect(machine, "host", status, "node2", words, options=hostfile(tmp_path))
    measured = any("tbf.doctor.link" in command[-1] for command in machine.commands)
    assert measured == (status != RED)  # a machine that isn't fit would keep the others waiting


def test_the_network_between_machines(tmp_path):
    machine = FakeMachine(answers=answering(host_answer(cards=2)))
    seen = {finding.name: finding for finding in examine(machine, hostfile(tmp_path))}["network"]
    assert seen.status == GREEN and "node1 by eth0, node2 by eth0: 8.80 Gbit/s each way" in seen.seen
    assert "tbf plan --nodes 2 --network 8.8 --latency 0.05" in seen.seen


@pytest.mark.parametrize(
    ("host", "link", "status", "words"),
    [
        (
            "node2",
            link_answer(failed="port", why="timed out"),
            RED,
            "node2 cannot reach port 29500 of node1 (timed out)",
        ),
        ("node1", link_answer(failed="port", why="in use"), RED, "node1 cannot listen on port 29500 (in use)"),
        ("node1", link_answer(failed="machines", why="1"), RED, "nothing came from node2 to port 29500 of node1"),
        ("node2", link_answer(failed="card", card=None), RED, "GLOO_SOCKET_IFNAME=eth0"),
        ("node2", link_answer(failed="ports", why="connectFullMesh"), RED, "open the ports above 1024"),
        ("node2", Answer(1, "No module named tbf"), RED, "node2: No module named tbf"),
        ("node2", link_answer(bytes_per_s=1.2e7), YELLOW, "0.10 Gbit/s each way"),
        ("node2", link_answer(latency_s=0.02), YELLOW, "a message takes 20.00 ms"),
        ("node2", link_answer(card="wlan0"), YELLOW, "the way from node2 leads over eth0"),
    ],
)
def test_a_network_that_is_not_fit(tmp_path, host, link, status, words):
    machine = FakeMachine(answers=answering(host_answer(cards=2), link, host))
    expect(machine, "network", status, words, options=hostfile(tmp_path))


def test_data_of_the_machines(tmp_path):
    options = replace(hostfile(tmp_path), data=Path("/data/es"))
    here = {"tokenizer": "aa", "text": "bb"}
    machine = FakeMachine(answers=answering(host_answer(cards=2, data=here)))
    seen = {finding.name: finding for finding in examine(machine, options)}["data"]
    assert seen.status == GREEN and seen.seen == "the same on 2 machine(s): tokenizer aa, text bb"
    assert all(
        "tbf.doctor.versions /data/es" in command[-1] for command in machine.commands if "versions" in command[-1]
    )

    def answers(data):
        def answer(command):
            last = {"node1": here, "node2": data}.get(command[command.index("--") + 1] if "ssh" in command else "", {})
            return link_answer() if "tbf.doctor.link" in command[-1] else host_answer(cards=2, data=last)

        return answer

    other = FakeMachine(answers=answers({**here, "text": "cc"}), programs=("ninja", "g++", "pdsh"))
    found = sick(other, options)
    assert found["data"][:2] == (RED, "node2 has another text (cc) than node1 (bb)")
    found = sick(FakeMachine(answers=answers({"error": "index.json is missing"})), options)
    assert found["data"][:2] == (RED, "node2: index.json is missing")


def test_this_machine_needs_no_ssh(tmp_path):
    machine = FakeMachine(answers=lambda command: host_answer())
    assert not sick(machine, hostfile(tmp_path, "localhost slots=1"))
    assert not any("ssh" in command for command in machine.commands)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no machine"),
        ("node1", "line 1: 'node1' is not"),
        ("-oProxyCommand=x slots=1", "line 1"),  # would be an option of ssh
        ("a slots=1\n\na slots=2", "line 3: 'a slots=2' stands there twice"),
        ("a slots=x", "line 1"),
    ],
)
def test_bad_hostfiles(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        list(examine(FakeMachine(), hostfile(tmp_path, text)))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(examine(FakeMachine(), Options(hostfile=tmp_path / "absent")))


def test_a_check_that_breaks_hides_no_other(monkeypatch):
    def strange_check(machine, options):
        raise KeyError("flags")
        yield

    monkeypatch.setattr(examination, "CHECKS", (strange_check, *CHECKS))
    expect(FakeMachine(), "strange check", YELLOW, "KeyError", "flags")
