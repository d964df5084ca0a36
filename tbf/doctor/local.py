"""This machine, asked for real."""

from __future__ import annotations

import ctypes
import ctypes.util
import datetime
import errno
import functools
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from tbf.config import load_run_config
from tbf.doctor import disk, sensors
from tbf.doctor.machine import Answer, DiskSpeed, Gpu, Machine, Memory, Operators, Processor, Torch
from tbf.doctor.versions import installed
from tbf.errors import EngineError, HardwareError
from tbf.hardware.probe import driver_release
from tbf.model.bitlinear import ternary_shapes
from tbf.model.flops import build_meta
from tbf.ops.ternary_backends import fastest_tools, get_backend
from tbf.ops.ternary_nvrtc import nvrtc_version
from tbf.ops.ternary_probe import choose_plan, device_name
from tbf.system import cache_root, container_limit
from tbf.train.build_ops import extensions_dir

TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronised
LONGEST_BUILD = 900  # seconds


class LocalMachine(Machine):
    """Every answer comes from the system at the moment it is asked for; the cards are read once."""

    def versions(self) -> dict[str, str | None]:
        return installed()

    @functools.cached_property
    def _torch(self) -> Torch:
        with warnings.catch_warnings():  # torch warns of cards that it has no kernels for: said better by a check
            warnings.simplefilter("ignore")
            cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
            nccl = torch.cuda.nccl.version() if cards and dist.is_nccl_available() else None
            return Torch(
                torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()), cards,
                ".".join(map(str, nccl)) if nccl else None,
            )  # fmt: skip

    def torch(self) -> Torch:
        return self._torch

    def driver(self) -> str | None:
        nvml = sensors.load()
        return driver_release() or (sensors.driver(nvml) if nvml else None)

    def cards_on_bus(self) -> int:
        return count_cards(Path("/sys/bus/pci/devices"))

    @functools.cached_property
    def _gpus(self) -> list[Gpu]:
        nvml = sensors.load()
        seen = sensors.read(nvml) if nvml else {}
        if not self._torch.cards:
            return list(seen.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            properties = [torch.cuda.get_device_properties(index) for index in range(self._torch.cards)]
        return [merge_gpu(found, seen) for found in properties]

    def gpus(self) -> list[Gpu]:
        return self._gpus

    def reads_sensors(self) -> bool:
        return sensors.load() is not None

    def nvrtc(self) -> str | None:
        try:
            return nvrtc_version()
        except HardwareError:
            return None

    def kernels(self, card: int | None) -> tuple[str, str]:
        device = torch.device("cpu") if card is None else torch.device("cuda", card)
        if card is not None:
            torch.cuda.set_device(device)
            fastest_tools.cache_clear()  # they belong to the card that was current, as a rank has only one
            get_backend.cache_clear()
        said: list[str] = []
        shapes = ternary_shapes(build_meta(load_run_config("mini").model))  # as in `make train`, whose verdict this is
        plan = choose_plan(device, shapes, say=said.append)
        return f"{plan} (preset mini, {device_name(device)})", "\n".join(said[0].splitlines()[1:])

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def which(self, program: str) -> str | None:
        beside = Path(sys.executable).parent  # ninja comes as a Python package
        return shutil.which(program) or shutil.which(program, path=str(beside))

    def run(self, command: Sequence[str], timeout: float) -> Answer:
        try:
            done = subprocess.run(
                list(command),
                capture_output=True,
                text=True,
                timeout=timeout,
                stdin=subprocess.DEVNULL,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            return Answer(124, f"no answer within {timeout:.0f} s")
        except OSError as error:
            return Answer(127, f"{command[0]}: {error.strerror}")
        return Answer(done.returncode, done.stderr + done.stdout)  # the answer last

    def has_libaio(self) -> bool:
        folders = ("/usr/include", "/usr/local/include", *os.environ.get("CPATH", "").split(os.pathsep))
        header = any((Path(folder) / "libaio.h").exists() for folder in folders if folder)
        return header and ctypes.util.find_library("aio") is not None

    def operators(self) -> Operators:
        folder, now = extensions_dir(), time.time()
        compiled = tuple(sorted({path.parent.name for path in folder.glob("*/*.so")}))
        locks = tuple((shorten(path), now - path.stat().st_mtime) for path in folder.glob("*/lock"))
        return Operators(shorten(folder), compiled, locks)

    def build_host_adam(self) -> float:
        with tempfile.TemporaryDirectory(prefix="tbf-doctor-") as scratch:
            env = {**os.environ, "TORCH_EXTENSIONS_DIR": scratch}
            started = time.monotonic()
            command = [sys.executable, "-m", "tbf.train.build_ops"]
            try:
                done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LONGEST_BUILD)
            except subprocess.TimeoutExpired:
                raise EngineError(f"still compiling after {LONGEST_BUILD / 60:.0f} min") from None
            if not list(Path(scratch).glob("cpu_adam/*.so")):
                lines = [line for line in done.stdout.splitlines() if "cpu_adam" in line] or done.stderr.splitlines()
                raise EngineError(lines[-1] if lines else "the build said nothing")
            return time.monotonic() - started

    def processor(self) -> Processor:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Processor(device_name(torch.device("cpu")), psutil.cpu_count(logical=False) or threads, threads)

    def memory(self) -> Memory:
        memory, swap, shm = psutil.virtual_memory(), psutil.swap_memory(), Path("/dev/shm")
        shared = shutil.disk_usage(shm).total if shm.is_dir() else None
        return Memory(memory.total, memory.available, swap.total, swap.used, container_limit(), shared)

    def limit(self, name: str) -> int | None:
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
        return None if soft == resource.RLIM_INFINITY else soft

    def free_space(self, folder: Path) -> int:
        self._make_cache(folder)
        return shutil.disk_usage(folder).free

    def disk_speed(self, folder: Path) -> DiskSpeed:
        self._make_cache(folder)
        return disk.disk_speed(folder)

    def _make_cache(self, folder: Path) -> None:
        if folder == cache_root():  # ours to make; a folder that the user named must be there
            folder.mkdir(parents=True, exist_ok=True)

    def clock_synchronised(self) -> bool | None:
        answer = self.run(["timedatectl", "show", "-p", "NTPSynchronized", "--value"], timeout=5)
        words = answer.output.split()
        if answer.code == 0 and words and words[-1] in ("yes", "no"):
            return words[-1] == "yes"
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "adjtimex"):
            return None
        state = libc.adjtimex(ctypes.create_string_buffer(512))  # all zero: asks, sets nothing
        return None if state < 0 else state != TIME_ERROR

    def own_address(self) -> str | None:
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            return None

    def gloo(self) -> None:
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)
        wait = datetime.timedelta(seconds=20)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
        try:
            dist.all_reduce(torch.ones(1))
        finally:
            dist.destroy_process_group()

    def port_taken(self, port: int) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that just ended is no server
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
                raise
        return False


def count_cards(devices: Path) -> int:
    """NVIDIA's display and 3D controllers among the PCI devices."""
    found = 0
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        found += vendor == "0x10de" and kind.startswith("0x03")
    return found


def merge_gpu(properties: object, seen: dict[str, Gpu]) -> Gpu:
    """torch's properties of a card, with what NVML knows of the same one (matched by UUID)."""
    uuid = str(getattr(properties, "uuid", "none"))
    known = next((gpu for name, gpu in seen.items() if name.removeprefix("GPU-") == uuid.removeprefix("GPU-")), None)
    mine = Gpu(properties.name, (properties.major, properties.minor), properties.total_memory)
    return replace(known, name=mine.name, capability=mine.capability) if known else mine


def shorten(path: Path) -> str:
    """The path with the home folder as `~`: reports get pasted."""
    home = str(Path.home())
    return str(path).replace(home, "~", 1) if str(path).startswith(home + os.sep) else str(path)
