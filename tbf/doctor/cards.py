"""Checks of the cards: driver, torch's kernels for them, their state, and the ternary kernels they take."""

from __future__ import annotations

from collections.abc import Iterator

from tbf.doctor.finding import Finding, green, red, yellow
from tbf.doctor.machine import GIB, Gpu, Machine
from tbf.doctor.options import Options
from tbf.errors import TbfError
from tbf.hardware.probe import has_cubin
from tbf.ops.ternary_cuda import has_fast_dp4a

LAST_PASCAL_DRIVER = 580
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # for each CUDA major, NVIDIA's table of minor-version compatibility
FIRST_AFTER_VOLTA = (7, 5)
PASCAL_TORCH = "torch 2.14.1 from PyTorch's CUDA 12.6 (cu126) wheel index, or torch 2.7.1 from the default one"
HOT = 85  # degrees Celsius; Pascal slows down some degrees above


def driver(machine: Machine, options: Options) -> Iterator[Finding]:
    """A driver for the cards on the bus; R580 is the last that carries Maxwell, Pascal and Volta."""
    release, on_bus, gpus = machine.driver(), machine.cards_on_bus(), machine.gpus()
    if machine.variable("DS_ACCELERATOR") == "cpu":
        yield green("driver", "not asked: DS_ACCELERATOR=cpu trains on the CPU")
        return
    if release is None and gpus:  # torch drives them, as under WSL
        yield green("driver", "loaded; nothing here tells its release")
        return
    if release is None and not on_bus:
        yield green("driver", "no NVIDIA card here: training runs on the CPU")
        return
    if release is None:
        yield red(
            "driver", f"{on_bus} NVIDIA card(s) on the bus and no driver loaded",
            f"install NVIDIA's driver, R{LAST_PASCAL_DRIVER} for a P40, and reboot; in a container, pass the cards in",
        )  # fmt: skip
        return
    major = int(release.partition(".")[0])
    old_cards = [gpu.name for gpu in gpus if gpu.capability < FIRST_AFTER_VOLTA]
    if major > LAST_PASCAL_DRIVER and (old_cards or len(gpus) < on_bus):
        lost = ", ".join(old_cards) or f"{on_bus - len(gpus)} of {on_bus} card(s) on the bus"
        yield red(
            "driver", f"{release} does not carry {lost}",
            f"install R{LAST_PASCAL_DRIVER}, the last for Maxwell, Pascal and Volta",
        )  # fmt: skip
        return
    cuda = machine.torch().cuda
    needed = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0) if cuda else 0
    if major < needed:
        yield red(
            "driver", f"{release}, too old for torch's CUDA {cuda}", f"install R{needed} or newer, R580 for a P40"
        )
        return
    note = f", R{LAST_PASCAL_DRIVER} is the last for these cards: do not upgrade past it" if old_cards else ""
    yield green("driver", release + note)


def torch_sees_cards(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether this torch was built for CUDA and finds the cards."""
    torch, there = machine.torch(), max(len(machine.gpus()), machine.cards_on_bus())
    if not there:
        return
    hidden = machine.variable("CUDA_VISIBLE_DEVICES")
    if torch.cuda is None:
        yield red("torch", f"{torch.version} is a CPU build beside {there} card(s)", f"install {PASCAL_TORCH}")
    elif torch.cards < there and hidden is not None:
        seen = f"sees {torch.cards} of {there} card(s): CUDA_VISIBLE_DEVICES={hidden}"
        cure = "unset it unless that is meant"
        yield red("torch", seen, cure) if not torch.cards else yellow("torch", seen, cure)
    elif torch.cards < there:
        yield red(
            "torch", f"{torch.version} sees {torch.cards} of {there} card(s)",
            "see the driver above; nvidia-smi must list all cards, and /dev/nvidia* be readable for this user",
        )  # fmt: skip
    else:
        yield green("torch", f"{torch.version}, CUDA {torch.cuda}, sees {torch.cards} card(s)")


def kernels_for_cards(machine: Machine, options: Options) -> Iterator[Finding]:
    """Machine code for each kind of card: sm_60 serves sm_61. PTX alone does not count: libraries have none."""
    torch = machine.torch()
    for gpu in dict.fromkeys((gpu.name, gpu.capability) for gpu in machine.gpus()):
        name, capability = gpu
        card = f"{name} (sm_{capability[0]}{capability[1]})"
        if torch.cuda is None or not torch.cards:
            continue  # said above
        carried = ", ".join(torch.architectures) or "nothing"
        if has_cubin(capability, torch.architectures):
            yield green("torch kernels", f"carried for {card}")
            continue
        ptx = ", PTX only" if any(arch.startswith("compute_") for arch in torch.architectures) else ""
        yield red(
            "torch kernels", f"none for {card}: torch {torch.version} carries {carried}{ptx}",
            f"install {PASCAL_TORCH}" if capability < FIRST_AFTER_VOLTA else "install a torch build for this card",
        )  # fmt: skip


def cards(machine: Machine, options: Options) -> Iterator[Finding]:
    """Each card's memory, heat, slot and memory errors."""
    gpus = machine.gpus()
    for index, gpu in enumerate(gpus):
        seen = f"{gpu.name}, capability {gpu.capability[0]}.{gpu.capability[1]}, {_state(gpu)}"
        cure = "; ".join(_complaints(gpu))
        yield yellow(f"card {index}", seen, cure) if cure else green(f"card {index}", seen)
    if gpus and not machine.reads_sensors():
        yield yellow("sensors", "temperatures and PCIe links cannot be read", "pip install nvidia-ml-py")
    if len({(gpu.name, gpu.memory) for gpu in gpus}) > 1:
        smallest = min(gpu.memory for gpu in gpus)
        yield yellow(
            "unequal cards", ", ".join(f"{gpu.name} {gpu.memory / GIB:.1f} GiB" for gpu in gpus),
            f"the slowest sets the pace and {smallest / GIB:.1f} GiB the micro batch; "
            "CUDA_VISIBLE_DEVICES keeps the odd one out",
        )  # fmt: skip


def _state(gpu: Gpu) -> str:
    parts = [f"{gpu.memory / GIB:.1f} GiB"]
    if gpu.used is not None:
        parts.append(f"{gpu.used / GIB:.1f} in use")
    if gpu.ecc is not None:
        parts.append(f"ECC {'on' if gpu.ecc else 'off'}")
    if gpu.temperature is not None:
        parts.append(f"{gpu.temperature} °C")
    if gpu.lanes is not None:
        parts.append(f"PCIe x{gpu.lanes}" + (f" generation {gpu.generation}" if gpu.generation else ""))
    return ", ".join(parts)


def _complaints(gpu: Gpu) -> Iterator[str]:
    if gpu.temperature is not None and gpu.temperature >= HOT:
        yield f"{gpu.temperature} °C: it will slow down; a P40 has no fan of its own and needs air through it"
    if gpu.lanes is not None and gpu.most_lanes is not None and gpu.lanes < gpu.most_lanes:
        yield f"x{gpu.lanes} of x{gpu.most_lanes} lanes, and offload as much slower: reseat it or take another slot"
    if gpu.used is not None and gpu.used > GIB:
        yield f"another program holds {gpu.used / GIB:.1f} GiB (nvidia-smi names it)"
    if gpu.memory_errors:
        yield f"{gpu.memory_errors} uncorrected memory error(s): reset the card, and replace it if they return"


def nccl(machine: Machine, options: Options) -> Iterator[Finding]:
    """What joins the ranks on cards."""
    torch, needed = machine.torch(), max(len(machine.gpus()), 2 if options.hostfile else 0) > 1
    if not machine.gpus():
        return
    if torch.nccl:
        yield green("nccl", torch.nccl)
    else:
        make = red if needed else yellow
        yield make("nccl", f"torch {torch.version} has none", f"more than one card needs it: install {PASCAL_TORCH}")


def nvrtc(machine: Machine, options: Options) -> Iterator[Finding]:
    """The run-time compiler of our DP4A kernels. CUDA 13's no longer knows cards before Turing."""
    dp4a = [gpu for gpu in machine.gpus() if has_fast_dp4a(gpu.capability)]
    if not dp4a:
        return
    version, cure = machine.nvrtc(), "pip install nvidia-cuda-nvrtc-cu12==12.6.85; until then products are FP32"
    if version is None:
        yield yellow("nvrtc", "none: the DP4A kernels cannot be compiled", cure)
    elif int(version.partition(".")[0]) >= 13 and any(gpu.capability < FIRST_AFTER_VOLTA for gpu in dp4a):
        yield yellow("nvrtc", f"{version} cannot compile for {dp4a[0].name}", cure)
    else:
        yield green("nvrtc", f"{version} compiles the DP4A kernels")


def ternary_kernels(machine: Machine, options: Options) -> Iterator[Finding]:
    """Which kernels training takes here, from the cache of the probe or measured now."""
    if not options.kernels:
        return
    torch, gpus = machine.torch(), machine.gpus()
    if not gpus:
        yield from _plan(machine, None, "CPU")
    for index, gpu in list(enumerate(gpus))[: torch.cards]:
        if has_cubin(gpu.capability, torch.architectures):
            yield from _plan(machine, index, f"card {index}", dp4a=has_fast_dp4a(gpu.capability))


def _plan(machine: Machine, card: int | None, where: str, dp4a: bool = False) -> Iterator[Finding]:
    try:
        plan, table = machine.kernels(card)
    except (TbfError, RuntimeError, OSError) as error:
        yield red("kernels", f"{where}: {str(error).splitlines()[0]}", "run `tbf bench gemm` and report its output")
        return
    if dp4a and "cuda" not in plan:
        yield yellow("kernels", f"{where}: {plan}", "no integer kernel is fast here: `tbf bench gemm` shows why", table)
    else:
        yield green("kernels", f"{where}: {plan}", table)
