"""Checks of what gets compiled here: DeepSpeed's host operators, and our own kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tbf.doctor.finding import Finding, green, red, yellow
from tbf.doctor.machine import Machine
from tbf.doctor.options import Options
from tbf.errors import EngineError

HOST_ADAM = "cpu_adam"
STALE_AFTER = 600  # seconds; the slowest operator compiles in a third of that
OLDEST = {"python": (3, 10), "torch": (2, 7), "deepspeed": (0, 19, 8)}


def versions(machine: Machine, options: Options) -> Iterator[Finding]:
    """The versions that tbf is made for. DeepSpeed before 0.19.8 applies steps of NaN."""
    found = machine.versions()
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    old = [name for name, least in OLDEST.items() if _numbers(found.get(name)) < least]
    if old:
        wanted = ", ".join(f"{name} >= {'.'.join(map(str, OLDEST[name]))}" for name in old)
        yield red("versions", text, f"install {wanted} (make setup)")
    else:
        yield green("versions", text)


def compiler(machine: Machine, options: Options) -> Iterator[Finding]:
    """A C++ compiler and ninja build the host Adam and the CPU's ternary kernels."""
    chosen = machine.variable("CXX")
    names = [chosen] if chosen else ["g++", "clang++", "c++"]
    program = next((name for name in names if machine.which(name.split()[0])), None)
    if program is None:
        yield yellow(
            "compiler", f"none of {', '.join(names)}: slower optimizer and slower CPU kernels",
            "apt install build-essential, or set CXX",
        )  # fmt: skip
    else:
        answer = machine.run([*program.split(), "--version"], timeout=30)
        first = (answer.output.strip().splitlines() or ["no version"])[0]
        if answer.code == 0:
            yield green("compiler", first)
        else:
            yield yellow("compiler", f"{program} does not run ({first})", "apt install build-essential, or set CXX")
    if machine.which("ninja"):
        yield green("ninja", "found")
    else:
        yield yellow("ninja", "missing: DeepSpeed's operators cannot be compiled", "pip install ninja")


def cuda_toolkit(machine: Machine, options: Options) -> Iterator[Finding]:
    """nvcc: only NVMe offload on a card needs it, and then of torch's CUDA major."""
    built_for, found = machine.torch().cuda, None
    if not machine.gpus() or built_for is None:
        return
    home = machine.variable("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else "nvcc"
    if machine.which(nvcc):
        match = re.search(r"release (\d+\.\d+)", machine.run([nvcc, "--version"], timeout=30).output)
        found = match.group(1) if match else None
    same = found is not None and found.partition(".")[0] == built_for.partition(".")[0]
    cure = f"install the CUDA {built_for} toolkit beside it and set CUDA_HOME"
    if same or (found is None and options.nvme is None):
        yield green("CUDA toolkit", found or "none; only NVMe offload on a card needs one")
    elif options.nvme:
        yield red("CUDA toolkit", f"{found or 'none'}; NVMe offload needs torch's {built_for}", cure)
    else:
        yield green("CUDA toolkit", f"{found}, unlike torch's {built_for}; only NVMe offload would need it")


def libaio(machine: Machine, options: Options) -> Iterator[Finding]:
    """Asynchronous files, for ZeRO-Infinity alone."""
    if machine.has_libaio():
        yield green("libaio", "found")
    elif options.nvme:
        yield red("libaio", "missing: NVMe offload cannot be compiled", "apt install libaio-dev")
    else:
        yield green("libaio", "missing; only NVMe offload needs it (apt install libaio-dev)")


def host_adam(machine: Machine, options: Options) -> Iterator[Finding]:
    """DeepSpeed's fused host optimizer: compiled already, or with --build compiled for real in a scratch cache."""
    operators = machine.operators()
    cure = "see the compiler above; without it torch's AdamW steps in, several times slower"
    if options.build:
        try:
            seconds = machine.build_host_adam()
        except EngineError as error:
            yield yellow("host Adam", f"does not compile: {error}", cure)
        else:
            yield green("host Adam", f"compiles and loads: {seconds:.0f} s in a scratch folder")
    elif HOST_ADAM in operators.compiled:
        yield green("host Adam", f"compiled, in {operators.folder}")
    else:
        yield yellow(
            "host Adam", f"not compiled yet in {operators.folder}",
            "the first run does it, in one to three minutes; `tbf doctor --build` tries it",
        )  # fmt: skip


def build_locks(machine: Machine, options: Options) -> Iterator[Finding]:
    """A killed build leaves torch's lock behind, on which every later build waits for ever."""
    locks = machine.operators().locks
    stale = [(path, age) for path, age in locks if age > STALE_AFTER]
    if stale:
        oldest = max(age for _, age in stale)
        yield yellow(
            "build locks", f"{len(stale)} stale, the oldest {oldest / 60:.0f} min",
            f"if nothing is compiling now: rm {stale[0][0]} (tbf's own start-up does it too)",
        )  # fmt: skip
    else:
        yield green("build locks", "a build is under way" if locks else "none")


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:3])
