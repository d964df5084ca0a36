"""What `tbf doctor` asks of a machine, as an interface: tests answer for machines that nobody here has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One card. Bytes, degrees Celsius and PCIe lanes; None where nothing on this machine tells."""

    name: str
    capability: tuple[int, int]
    memory: int
    used: int | None = None
    temperature: int | None = None
    lanes: int | None = None
    most_lanes: int | None = None
    generation: int | None = None
    ecc: bool | None = None
    memory_errors: int | None = None


@dataclass(frozen=True)
class Torch:
    """How this torch was built, and how many cards it sees."""

    version: str
    cuda: str | None
    architectures: tuple[str, ...]
    cards: int
    nccl: str | None


@dataclass(frozen=True)
class Processor:
    """Physical cores, and the threads that may run at once."""

    name: str
    cores: int
    threads: int


@dataclass(frozen=True)
class Memory:
    """Bytes of host memory. `limit` is the container's, `shared` the size of /dev/shm (None: there is none)."""

    total: int
    available: int
    swap: int
    swapped: int
    limit: int | None
    shared: int | None


@dataclass(frozen=True)
class Operators:
    """DeepSpeed's compiled host operators in our cache, and torch's lock files there with their age in seconds."""

    folder: str
    compiled: tuple[str, ...]
    locks: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second of one large file. `direct`: past the page cache; otherwise synced, and read back uncached."""

    write: float
    read: float
    direct: bool


@dataclass(frozen=True)
class Answer:
    """How a command ended: 127 if there is no such program, 124 if it took too long."""

    code: int
    output: str


class Machine(Protocol):
    """One machine. Whatever can't be told is None; methods raise only what they say."""

    def versions(self) -> dict[str, str | None]:
        """Of python, torch, deepspeed and tbf."""

    def torch(self) -> Torch: ...

    def driver(self) -> str | None:
        """The NVIDIA driver's release, None where none is loaded."""

    def cards_on_bus(self) -> int:
        """NVIDIA cards that the PCI bus shows, with or without a driver."""

    def gpus(self) -> list[Gpu]: ...

    def reads_sensors(self) -> bool:
        """Whether temperatures and the like can be read (NVML)."""

    def nvrtc(self) -> str | None:
        """The version of the CUDA run-time compiler."""

    def kernels(self, card: int | None) -> tuple[str, str]:
        """The ternary plan of a card (None: the CPU), and the probe's table. Raises HardwareError or RuntimeError."""

    def variable(self, name: str) -> str | None:
        """One of the environment."""

    def which(self, program: str) -> str | None: ...

    def run(self, command: Sequence[str], timeout: float) -> Answer: ...

    def has_libaio(self) -> bool:
        """Header and library."""

    def operators(self) -> Operators: ...

    def build_host_adam(self) -> float:
        """Compiles it in a scratch cache; returns the seconds. Raises EngineError with the compiler's words."""

    def processor(self) -> Processor: ...

    def memory(self) -> Memory: ...

    def limit(self, name: str) -> int | None:
        """The soft limit `memlock` (bytes) or `nofile`; None means none."""

    def free_space(self, folder: Path) -> int:
        """Bytes. Raises OSError."""

    def disk_speed(self, folder: Path) -> DiskSpeed:
        """Writes, reads and deletes a file. Raises OSError."""

    def clock_synchronised(self) -> bool | None: ...

    def own_address(self) -> str | None:
        """What the machine's own name resolves to."""

    def gloo(self) -> None:
        """Makes a process group of one and reduces. Raises RuntimeError, OSError or ValueError."""

    def port_taken(self, port: int) -> bool: ...
