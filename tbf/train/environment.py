"""What must be settled before torch starts: which rank this process is, and how many threads it may take.

Imports neither torch nor DeepSpeed: OpenMP reads its variables once, when the first of them loads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import psutil

from tbf.errors import ConfigError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class ProcessInfo:
    """Where this process stands in the job, and who said so."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str


def discover_process(env: MutableMapping[str, str] = os.environ) -> ProcessInfo:
    """Finds the rank under `deepspeed`, `torchrun`, `srun`, OpenMPI or plain `python`, and completes the environment
    that torch.distributed reads.

    Raises ConfigError when the variables are half set or contradict each other.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed"
        missing = [name for name in _NAMES if name not in env]
        if missing:
            raise ConfigError(
                f"the environment is half set: {', '.join(missing)} missing beside RANK={env.get('RANK')} "
                f"WORLD_SIZE={env.get('WORLD_SIZE')}; start with deepspeed, torchrun or srun, or unset both"
            )
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        launcher = "srun"
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env.get("SLURM_LOCALID", "0")
        env["WORLD_SIZE"] = env["SLURM_NTASKS"]
        env.setdefault("LOCAL_WORLD_SIZE", _tasks_on_this_node(env))
        env.setdefault("MASTER_ADDR", _first_slurm_host(env))
        env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 20_000))
    elif "OMPI_COMM_WORLD_RANK" in env:
        launcher = "openmpi"
        env["RANK"], env["LOCAL_RANK"] = env["OMPI_COMM_WORLD_RANK"], env["OMPI_COMM_WORLD_LOCAL_RANK"]
        env["WORLD_SIZE"] = env["OMPI_COMM_WORLD_SIZE"]
        env.setdefault("LOCAL_WORLD_SIZE", env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "started by mpirun without MASTER_ADDR; add -x MASTER_ADDR=<first host> -x MASTER_PORT=29500"
            )
        env.setdefault("MASTER_PORT", "29500")
    else:
        launcher = "python"
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        env["MASTER_PORT"] = str(_free_port())
    return _checked(env, launcher)


def _checked(env: Mapping[str, str], launcher: str) -> ProcessInfo:
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        try:
            numbers[name] = int(env[name])
        except ValueError:
            raise ConfigError(f"{name} is '{env[name]}' in the environment; it must be a whole number") from None
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise ConfigError(f"RANK {numbers['RANK']} does not lie below WORLD_SIZE {numbers['WORLD_SIZE']}")
    local = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or 1)
    return ProcessInfo(numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"], local, launcher)


def set_threads(process: ProcessInfo, env: MutableMapping[str, str] = os.environ) -> int:
    """Gives each local rank its share of the physical cores; returns the number of threads.

    The host Adam of ZeRO-Offload and all CPU mathematics run on OpenMP: one thread makes the optimizer many times
    slower. torchrun sets OMP_NUM_THREADS=1 on its own, so under it that value is replaced; TBF_NUM_THREADS always
    wins; anywhere else an OMP_NUM_THREADS that the user set is kept.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or cores
    share = max(1, min(cores, physical) // max(1, process.local_world_size))
    if env.get("TBF_NUM_THREADS"):
        share = int(env["TBF_NUM_THREADS"])
    elif env.get("OMP_NUM_THREADS") and not (process.launcher == "torchrun" and env["OMP_NUM_THREADS"] == "1"):
        share = int(env["OMP_NUM_THREADS"])
    env["OMP_NUM_THREADS"] = str(share)
    return share


def tune_allocator(env: Mapping[str, str] = os.environ) -> str:
    """Makes glibc keep freed memory; returns what was done, or why nothing was.

    By default each large tensor is mapped anew and faulted in page by page, which costs more than many of the
    operations on it. `TBF_MALLOC=0` leaves the allocator alone, as do libraries other than glibc.
    """
    if env.get("TBF_MALLOC") == "0":
        return "left alone by TBF_MALLOC=0"
    if platform.libc_ver()[0] != "glibc":
        return "left alone: this is not glibc"
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20)):
        libc.mallopt(parameter, value)
    return "glibc keeps freed memory (TBF_MALLOC=0 turns that off)"


def has_nvidia_device() -> bool:
    """Whether the machine shows an NVIDIA card, whatever torch was built for."""
    return os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidia0")  # noqa: PTH110


def choose_accelerator(env: MutableMapping[str, str] = os.environ) -> str:
    """Returns why this process runs on the CPU, or "" when it uses the card. Must run before DeepSpeed is imported.

    DeepSpeed takes the CPU silently whenever torch sees no card; here that happens only when it was asked for
    (`DS_ACCELERATOR=cpu`) or when the machine has no NVIDIA device at all.
    """
    if env.get("DS_ACCELERATOR") == "cpu":
        return "asked for by DS_ACCELERATOR=cpu"
    if not env.get("DS_ACCELERATOR") and not has_nvidia_device():
        env["DS_ACCELERATOR"] = "cpu"
        return "this machine has no NVIDIA device"
    return ""


def _tasks_on_this_node(env: Mapping[str, str]) -> str:
    """SLURM_TASKS_PER_NODE reads like `2(x3),1`: counts with repetitions, in node order."""
    counts: list[str] = []
    for part in env.get("SLURM_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _first_slurm_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_JOB_NODELIST", "")
    if "[" not in nodes:
        return nodes.split(",")[0] or "127.0.0.1"
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"cannot expand SLURM_JOB_NODELIST '{nodes}' ({error}); set MASTER_ADDR") from None
    return listing.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
