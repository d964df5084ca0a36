"""Compiles csrc/ternary_cuda.cu at run time with NVRTC, which torch's CUDA wheels bring along, and launches it.

No nvcc is needed on the machine. The machine code is kept in the user's cache under a key of source, architecture and
NVRTC version. Torch itself ships Pascal code for sm_60 only, where DP4A doesn't exist, so ours is built for the exact
card.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from tbf.errors import HardwareError
from tbf.ops.ternary_build import FOLDER, cache_folder

SOURCE = FOLDER / "ternary_cuda.cu"
FLAGS = ("--std=c++17", "-fmad=false")  # products and sums round one by one, as in eager torch
KERNELS = (
    *("quantise_rows", "gradient_rows", "column_largest", "gradient_columns", "transpose_bytes"),
    *("gemm_one", "gemm_two"),
)


@functools.lru_cache(maxsize=1)
def load_nvrtc() -> ctypes.CDLL:
    """The NVRTC library: the one in the process, or from torch's or NVIDIA's wheels. Raises HardwareError."""
    tried = []
    for path in nvrtc_candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path} ({error})")
    raise HardwareError(f"no usable NVRTC library among {', '.join(tried)}; install nvidia-cuda-nvrtc-cu12")


def nvrtc_version() -> str:
    """Such as `12.6`. Raises HardwareError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    load_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def nvrtc_candidates() -> list[str]:
    """Where NVRTC may lie, best first: by name when torch has loaded it, then inside the wheels."""
    found = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"]
    for package in ("torch", "nvidia"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            paths = sorted([*Path(root).glob("lib/libnvrtc*.so*"), *Path(root).glob("*/lib/libnvrtc*.so*")])
            found += [str(path) for path in paths if "builtins" not in path.name and ".alt." not in path.name]
    return found


def compile_source(architecture: str) -> bytes:
    """Machine code for `sm_61` and the like, PTX for `compute_61`. Raises HardwareError with the compiler's words."""
    nvrtc = load_nvrtc()
    program = ctypes.c_void_p()
    source = SOURCE.read_bytes()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"ternary_cuda.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={architecture}".encode(), *(flag.encode() for flag in FLAGS)]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            log = _fetch(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            lines = [line for line in log.splitlines() if "error" in line] or log.splitlines() or ["no message"]
            raise HardwareError(f"the CUDA kernels don't compile for {architecture} ({lines[0].strip()})")
        return _fetch(nvrtc, program, "CUBIN" if architecture.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cached_cubin(architecture: str) -> bytes:
    """`compile_source` of a real architecture, kept on disk."""
    key = hashlib.sha256(SOURCE.read_bytes() + repr((architecture, FLAGS, nvrtc_version())).encode())
    path = cache_folder() / f"ternary-{architecture}-{key.hexdigest()[:24]}.cubin"
    if path.exists():
        return path.read_bytes()
    code = compile_source(architecture)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(code)
    aside.replace(path)
    return code


class CudaModule:
    """The kernels on the current device, called on torch's current stream."""

    def __init__(self, cubin: bytes) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        module = ctypes.c_void_p()
        self._run("cuModuleLoadData", ctypes.byref(module), cubin)
        self._functions = {name: ctypes.c_void_p() for name in KERNELS}
        for name, function in self._functions.items():
            self._run("cuModuleGetFunction", ctypes.byref(function), module, name.encode())

    def launch(self, name: str, grid: tuple[int, int], arguments: Sequence[object], stream: int) -> None:
        """Queues one kernel. `arguments` are ctypes values; a grid without blocks does nothing."""
        if 0 in grid:
            return
        pointers = (ctypes.c_void_p * len(arguments))(
            *[ctypes.cast(ctypes.byref(argument), ctypes.c_void_p) for argument in arguments]
        )
        self._run(
            "cuLaunchKernel", self._functions[name], *grid, 1, 256, 1, 1, 0, ctypes.c_void_p(stream), pointers, None
        )

    def _run(self, name: str, *arguments: object) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")


def _fetch(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise HardwareError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")
