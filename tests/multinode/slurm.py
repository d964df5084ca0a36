"""A small SLURM cluster on the machines of a lab, with its own key, state and settings on each."""

from __future__ import annotations

import os
import shutil
import subprocess

from tests.multinode.lab import Lab, until

PROGRAMS = ("slurmctld", "slurmd", "srun", "munged")
CONF = """\
ClusterName=lab
SlurmctldHost=node1
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
JobRequeue=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def start(lab: Lab) -> dict[str, str]:
    """Starts the daemons; returns the variables that SLURM's commands need."""
    folder = lab.work / "slurm"
    nodes = "\n".join(f"NodeName={host} NodeAddr={lab.address(host)} CPUs=2 RealMemory=1000" for host in lab.hosts)
    key = os.urandom(128)
    for host in lab.hosts:
        here = lab.files(host) / "slurm"
        for name in ("spool", "state"):
            (here / name).mkdir(parents=True)
        (here / "slurm.conf").write_text(CONF.format(folder=folder, nodes=nodes))
        (here / "munge.key").write_bytes(key)
        (here / "munge.key").chmod(0o600)
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    for host in lab.hosts:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        options.append(f"--seed-file={folder}/munged.seed")
        _call(lab, host, ["munged", "--force", *options], {})
    _call(lab, "node1", ["slurmctld"], env)
    for host in lab.hosts:
        _call(lab, host, ["slurmd", "-N", host], env)

    def idle() -> bool:
        return lab.run("node1", ["sinfo", "-h", "-t", "idle", "-o", "%D"], **env)[1].strip() == str(len(lab.hosts))

    try:
        until(idle, 60, "two idle nodes")
    except AssertionError as error:
        logs = "".join(path.read_text()[-1500:] for path in sorted((lab.files("node1") / "slurm").glob("*.log")))
        raise AssertionError(f"{error}\n{logs}") from None
    return env


def _call(lab: Lab, host: str, command: list[object], env: dict[str, str]) -> None:
    program = shutil.which(str(command[0]))
    process = subprocess.run(
        ["nsenter", "--all", "--target", str(lab._machines[host][1]), f"--wdns={lab.work}", program,
         *map(str, command[1:])],
        env=lab.environment(**env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0, f"{command[0]} on {host}: {process.stderr[-2000:]}"
