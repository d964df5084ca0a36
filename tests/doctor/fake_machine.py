"""A machine that answers what a test wants: by default a healthy one with a P40 and a torch that serves it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tbf.doctor.machine import GIB, Answer, DiskSpeed, Gpu, Machine, Memory, Operators, Processor, Torch
from tbf.errors import EngineError

P40 = Gpu("Tesla P40", (6, 1), 24 * GIB, 0, 40, 16, 16, 3, True, 0)
RTX = Gpu("NVIDIA GeForce RTX 3090", (8, 6), 24 * GIB, 0, 45, 16, 16, 4)
CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
OPERATORS, XEON = Operators("~/.cache", ("cpu_adam",), ()), Processor("Xeon", 28, 56)
AMPLE, NVME_DRIVE = Memory(128 * GIB, 120 * GIB, 8 * GIB, 0, None, 64 * GIB), DiskSpeed(2e9, 3e9, True)
VERSIONS = {"tbf": "0.1.0", "python": "3.11.7", "torch": "2.14.1+cu126", "deepspeed": "0.19.8"}


def torch_of(*architectures: str, cuda: str | None = "12.6", cards: int = 1, nccl: str | None = "2.29.3") -> Torch:
    return Torch("2.14.1+cu126", cuda, architectures, cards, nccl)


def host_answer(
    versions: dict[str, str] = VERSIONS, cards: int = 1, clock: float = 0.0, data: dict[str, str] | None = None
) -> Answer:
    """What `python -m tbf.doctor.versions` prints on another machine."""
    found = {"versions": versions, "cards": cards, "time": time.time() + clock}
    return Answer(0, "a warning\n" + json.dumps({**found, "data": data} if data else found))


def link_answer(**changes: object) -> Answer:
    """What `python -m tbf.doctor.link` prints: a network of 10 Gbit/s."""
    found = {"card": "eth0", "route": "eth0", "bytes_per_s": 1.1e9, "latency_s": 5e-5, **changes}
    return Answer(0, "a warning\n" + json.dumps(found))


@dataclass
class FakeMachine(Machine):
    cards_found: list[Gpu] = field(default_factory=lambda: [P40])
    torch_built: Torch = field(default_factory=lambda: torch_of(*CUDA_126))
    driver_release: str | None = "580.95.05"
    on_bus: int | None = None
    sensors: bool = True
    nvrtc_version: str | None = "12.6"
    plan: str | Exception = "forward by cuda_dp4a, int8_hilo gradients by cuda_dp4a"
    variables: dict[str, str] = field(default_factory=dict)
    programs: tuple[str, ...] = ("g++", "ninja", "pdsh")
    answers: Callable[[Sequence[str]], Answer] = lambda command: Answer(0, "g++ 12.2.0")
    aio: bool = True
    operators_found: Operators = OPERATORS
    adam: float | str = 84.0
    cpu: Processor = XEON
    host_memory: Memory = AMPLE
    limits: dict[str, int | None] = field(default_factory=lambda: {"memlock": None, "nofile": 65536})
    free: int | OSError = 500 * GIB
    speed: DiskSpeed = NVME_DRIVE
    synchronised: bool | None = True
    address: str | None = "10.0.0.1"
    gloo_error: Exception | None = None
    taken: bool = False
    versions_found: dict[str, str | None] = field(default_factory=lambda: dict(VERSIONS))
    commands: list[list[str]] = field(default_factory=list)

    def versions(self):
        return self.versions_found

    def torch(self):
        return self.torch_built

    def driver(self):
        return self.driver_release

    def cards_on_bus(self):
        return len(self.cards_found) if self.on_bus is None else self.on_bus

    def gpus(self):
        return self.cards_found

    def reads_sensors(self):
        return self.sensors

    def nvrtc(self):
        return self.nvrtc_version

    def kernels(self, card):
        if isinstance(self.plan, Exception):
            raise self.plan
        return self.plan, "the table"

    def variable(self, name):
        return self.variables.get(name)

    def which(self, program):
        return f"/usr/bin/{program}" if program in self.programs else None

    def run(self, command, timeout):
        self.commands.append(list(command))
        return self.answers(command)

    def has_libaio(self):
        return self.aio

    def operators(self):
        return self.operators_found

    def build_host_adam(self):
        if isinstance(self.adam, str):
            raise EngineError(self.adam)
        return self.adam

    def processor(self):
        return self.cpu

    def memory(self):
        return self.host_memory

    def limit(self, name):
        return self.limits[name]

    def free_space(self, folder: Path):
        if isinstance(self.free, OSError):
            raise self.free
        return self.free

    def disk_speed(self, folder: Path):
        return self.speed

    def clock_synchronised(self):
        return self.synchronised

    def own_address(self):
        return self.address

    def gloo(self):
        if self.gloo_error:
            raise self.gloo_error

    def port_taken(self, port):
        return self.taken
