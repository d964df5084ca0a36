"""Training jobs on the machines of a lab, started as launch/multi_node.md says."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.helpers.runs import DS_ZERO2, ROOT, TINY
from tests.multinode.lab import Lab, settings, until

TRAIN = ROOT / "launch" / "train.py"
PORT = 29500
KEEPALIVE = ["PDSH_SSH_ARGS_APPEND=-o ServerAliveInterval=2 -o ServerAliveCountMax=2"]


class Job:
    """A started job: one process a host that a person would have typed into, and what they print."""

    def __init__(self, lab: Lab, commands: dict[str, Sequence[object]]) -> None:
        self.lab = lab
        self.processes = {host: lab.start(host, command) for host, command in commands.items()}
        self._texts: dict[str, list[str]] = {host: [] for host in commands}
        self._readers = [
            threading.Thread(target=self._read, args=(host, process), daemon=True)
            for host, process in self.processes.items()
        ]
        for reader in self._readers:
            reader.start()

    @property
    def output(self) -> str:
        return "".join(line for texts in self._texts.values() for line in texts)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if "error: " in line]

    def wait(self, timeout: float = 180.0) -> dict[str, int]:
        """Exit codes by host; the output is kept."""
        codes = {host: process.wait(timeout) for host, process in self.processes.items()}
        for reader in self._readers:
            reader.join(timeout)
        return codes

    def _read(self, host: str, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self._texts[host].append(line)


def write_inputs(lab: Lab, slots: int = 1, **train: object) -> Path:
    """The tiny preset, a hostfile and `.deepspeed_env` in every host's working folder; returns the preset's path."""
    data = {**TINY["data"], "cache_dir": str(lab.work / "data")}
    preset = {**TINY, "data": data, "train": {**TINY["train"], **train}}
    for host in lab.hosts:
        folder = lab.files(host)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(preset))
        (folder / "hostfile").write_text("".join(f"{name} slots={slots}\n" for name in lab.hosts))
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in settings().items()))
    return lab.work / "tiny.yaml"


def program(run_dir: Path, preset: Path, *more: object, ds_config: Path = DS_ZERO2) -> list[object]:
    return [TRAIN, "--ds_config", ds_config, "--preset", preset, "--run-dir", run_dir, *more]


def pdsh(lab: Lab, job: Sequence[object], env: Sequence[str] = ()) -> Job:
    """`env`: NAME=VALUE for the launcher."""
    return Job(lab, {lab.hosts[0]: ["env", *env, "deepspeed", "--hostfile", "hostfile", *job]})


def no_ssh(lab: Lab, job: Sequence[object], env: Sequence[str] = (), only: str = "") -> Job:
    """`env`: NAME=VALUE for the ranks; `only`: the one host on which somebody types the command."""
    launcher = ["env", *env, "deepspeed", "--hostfile", "hostfile", "--no_ssh", "--master_addr", lab.hosts[0]]
    lines = {host: [*launcher, "--node_rank", rank, *job] for rank, host in enumerate(lab.hosts)}
    return Job(lab, {host: line for host, line in lines.items() if only in ("", host)})


def torchrun(lab: Lab, job: Sequence[object], *options: object) -> Job:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", len(lab.hosts), "--nproc_per_node", 1]
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{lab.hosts[0]}:{PORT}", "--local_addr"]
    return Job(
        lab,
        {
            host: [*launcher, *options, "--node_rank", rank, *meet, host, *job]
            for rank, host in enumerate(lab.hosts)
        },
    )  # fmt: skip


def openmpi(lab: Lab, job: Sequence[object], *options: object) -> Job:
    names = ["MASTER_ADDR", "PATH", *settings()]
    passed = [part for name in names for part in ("-x", f"MASTER_ADDR={lab.hosts[0]}" if name == names[0] else name)]
    hosts = ",".join(f"{host}:1" for host in lab.hosts)
    launcher = ["mpirun", "--allow-run-as-root", "--host", hosts, "--map-by", "ppr:1:node", *passed, *options]
    return Job(lab, {lab.hosts[0]: [*launcher, sys.executable, *job]})


def checkpoints(lab: Lab, host: str = "node1") -> list[int]:
    """Steps of the complete ones in the host's own run folder."""
    found = (lab.files(host) / "run" / "checkpoints").glob("step-*/manifest.json")
    return sorted(int(path.parent.name[5:]) for path in found)


def status(lab: Lab, host: str = "node1") -> dict[str, object]:
    return json.loads((lab.files(host) / "run" / "run_status.json").read_text())


def until_saved(lab: Lab, job: Job, after: int = 0) -> float:
    """Waits until every host has a checkpoint of a step beyond `after`."""

    def saved() -> bool:
        assert any(p.poll() is None for p in job.processes.values()), job.output[-4000:]
        return all(checkpoints(lab, host) and checkpoints(lab, host)[-1] > after for host in lab.hosts)

    return until(saved, 240, "a checkpoint")


def until_gone(lab: Lab, seconds: float = 90, hosts: Sequence[str] = ()) -> float:
    """Waits until no process of a job is left, on any host or on those named."""

    def left() -> list[str]:
        return [line for host in hosts or lab.hosts for line in lab.processes(host, str(TRAIN))]

    return until(lambda: not left(), seconds, "the end of all processes")
