"""Checks of the host: cores, memory, limits, disk and clock."""

from __future__ import annotations

from collections.abc import Iterator

from tbf.doctor.finding import Finding, green, red, yellow
from tbf.doctor.machine import GIB, Machine
from tbf.doctor.options import Options

MIB = 2**20
ENOUGH_MEMORY, ENOUGH_SHARED, LEAST_SHARED = 16 * GIB, GIB, 128 * MIB
ENOUGH_MEMLOCK, ENOUGH_FILES = 64 * MIB, 4096
ENOUGH_SPACE, NVME_SPEED, DISK_SPEED = 20 * GIB, 1e9, 100e6


def cores(machine: Machine, options: Options) -> Iterator[Finding]:
    """The host Adam runs on all of them, unless a variable says otherwise."""
    cpu, threads = machine.processor(), machine.variable("OMP_NUM_THREADS")
    seen = f"{cpu.name}, {cpu.cores} core(s), {cpu.threads} thread(s)"
    if machine.variable("TBF_NUM_THREADS") is None and threads == "1" and min(cpu.cores, cpu.threads) > 1:
        yield yellow("processor", f"{seen}, OMP_NUM_THREADS=1", "unset it: the host optimizer would run on one core")
    else:
        yield green("processor", seen)


def memory(machine: Machine, options: Options) -> Iterator[Finding]:
    """What is free, and what a container allows."""
    found = machine.memory()
    allowed = min(found.total, found.limit or found.total)
    seen = f"{found.total / GIB:.1f} GiB, {found.available / GIB:.1f} free"
    if allowed < found.total:
        seen += f", this container may take {allowed / GIB:.1f}"
    if min(found.available, allowed) < ENOUGH_MEMORY:
        yield yellow("memory", seen, "enough for mini; the larger presets want 16 GiB and more (`tbf plan`)")
    else:
        yield green("memory", seen)
    if found.swapped > max(GIB, found.total // 20):
        yield yellow(
            "swap", f"{found.swapped / GIB:.1f} of {found.swap / GIB:.1f} GiB in use",
            "free memory first: a host optimizer that is swapped out crawls",
        )  # fmt: skip
    else:
        text = f"{found.swap / GIB:.1f} GiB, {found.swapped / GIB:.1f} in use" if found.swap else "none"
        yield green("swap", text)


def shared_memory(machine: Machine, options: Options) -> Iterator[Finding]:
    """/dev/shm: data workers and ranks hand tensors over there; Docker gives 64 MiB unless told otherwise."""
    size = machine.memory().shared
    cure = "docker run --shm-size=8g (or --ipc=host); elsewhere: mount -o remount,size=8G /dev/shm"
    if size is None:
        yield yellow("/dev/shm", "missing", cure)
    elif size < ENOUGH_SHARED:
        make = red if size < LEAST_SHARED else yellow
        yield make("/dev/shm", f"{size / MIB:,.0f} MiB: data workers die of a bus error when it is full", cure)
    else:
        yield green("/dev/shm", f"{size / GIB:.1f} GiB")


def limits(machine: Machine, options: Options) -> Iterator[Finding]:
    """Locked memory (InfiniBand and NVMe offload) and open files (one per shard, worker and rank)."""
    locked, files = machine.limit("memlock"), machine.limit("nofile")
    seen = "no limit" if locked is None else f"{locked / MIB:,.0f} MiB"
    if locked is not None and locked < ENOUGH_MEMLOCK and (options.nvme or options.hostfile):
        yield yellow(
            "memlock", f"{seen}: too little for NVMe offload and InfiniBand",
            "ulimit -l unlimited (/etc/security/limits.conf: * - memlock unlimited)",
        )  # fmt: skip
    else:
        yield green("memlock", seen)
    if files is not None and files < ENOUGH_FILES:
        cure = "ulimit -n 65536 (/etc/security/limits.conf: * - nofile 65536)"
        yield yellow("open files", f"{files:,}: a large corpus has more shards", cure)
    else:
        yield green("open files", "no limit" if files is None else f"{files:,}")


def disk(machine: Machine, options: Options) -> Iterator[Finding]:
    """A short probe of the folder of caches, or of NVMe offload: 1 GB/s is where offload starts to make sense."""
    where = "NVMe" if options.nvme else "disk"
    try:
        free, speed = machine.free_space(options.disk), machine.disk_speed(options.disk)
    except OSError as error:
        make = red if options.nvme else yellow
        yield make(where, f"{error.strerror or error}", "give a folder on a local disk that this user may write to")
        return
    how = "past the page cache" if speed.direct else "synced; this file system knows no direct access"
    seen = f"writes {speed.write / 1e9:.2f} GB/s, reads {speed.read / 1e9:.2f} GB/s ({how}), {free / GIB:.0f} GiB free"
    if free < ENOUGH_SPACE:
        yield yellow(where, seen, "free some: shards and checkpoints want 20 GiB and more (`tbf data gc`)")
    elif options.nvme and min(speed.write, speed.read) < NVME_SPEED:
        yield yellow(where, seen, "an NVMe drive gives 1 GB/s and more; offload to host RAM instead if it fits")
    elif min(speed.write, speed.read) < DISK_SPEED:
        yield yellow(where, seen, "slow: checkpoints will hold training up; take a local disk for runs and caches")
    else:
        yield green(where, seen)


def clock(machine: Machine, options: Options) -> Iterator[Finding]:
    """Machines of one job must agree on the time: make, caches and logs compare it."""
    synchronised = machine.clock_synchronised()
    if synchronised is None:
        yield green("clock", "nothing here tells whether it is synchronised")
    elif synchronised or not options.hostfile:
        yield green("clock", "synchronised" if synchronised else "not synchronised; that matters between machines only")
    else:
        yield yellow("clock", "not synchronised", "timedatectl set-ntp true, on every machine")
