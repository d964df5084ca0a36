"""What the planner knows of each card: memory and peak rates, as their vendors state them.

| what | source |
|---|---|
| P40, P100, V100, T4 | NVIDIA's product briefs and datasheets of the Tesla P40 (2016), P100 PCIe, V100 PCIe and T4 |
| GTX 1080 Ti, RTX 3090 | NVIDIA's specification pages and the GA102 whitepaper |
| A100, H100 | NVIDIA's datasheets of the A100 80 GB PCIe and the H100 PCIe |
| share of the peak that code reaches | the factors below; assumptions until a card confirms them (docs/unverified.md) |

INT8 by DP4A is four times FP32 on every card that has it; tensor cores serve INT8 through cublasLt (`cuda_int_mm`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tbf.errors import ConfigError, nearest

GB, GIB, TERA = 1e9, 1 << 30, 1e12

GEMM_SHARE, DP4A_SHARE, TENSOR_SHARE, MEMORY_SHARE, PCIE_SHARE = 0.75, 0.55, 0.35, 0.75, 0.75
"""Of the peaks: FP32 products, DP4A (a P40 measured 0.35 to 0.7 of it in others' kernels), tensor cores at our shapes,
and copies."""
KERNEL_LAUNCH_S = 6e-6
"""Time between two small kernels that the host launches."""
CONTEXT_BYTES = int(0.45 * GB)
"""CUDA context, cuBLAS workspaces and NCCL buffers."""


@dataclass(frozen=True)
class Device:
    """One accelerator. Bytes, operations per second and bytes per second."""

    key: str
    name: str
    """A part of what the driver calls it."""
    memory: float
    """Usable, with ECC on where the card has it."""
    fp32_flops: float
    int8_ops: float
    """Of the backend that would serve; 0 where none does."""
    int8_backend: str
    """`cuda_dp4a`, `cuda_int_mm`, or `fp32` where integers must be multiplied as floating point."""
    bandwidth: float
    pcie: float
    """Per direction."""
    capability: tuple[int, int]

    @property
    def on_cuda(self) -> bool:
        return self.capability > (0, 0)


DEVICES = {
    device.key: device
    for device in (
        Device("p40", "Tesla P40", 22.5 * GIB, 11.76 * TERA, 47.0 * TERA, "cuda_dp4a", 346 * GB, 15.75 * GB, (6, 1)),
        Device("p100", "Tesla P100", 16.0 * GIB, 9.3 * TERA, 0.0, "fp32", 732 * GB, 15.75 * GB, (6, 0)),
        Device("v100", "Tesla V100", 16.0 * GIB, 14.0 * TERA, 56.0 * TERA, "cuda_dp4a", 900 * GB, 15.75 * GB, (7, 0)),
        Device("1080ti", "GTX 1080 Ti", 11.0 * GIB, 11.34 * TERA, 45.4 * TERA, "cuda_dp4a", 484 * GB, 15.75 * GB,
               (6, 1)),
        Device("t4", "Tesla T4", 14.6 * GIB, 8.1 * TERA, 130.0 * TERA, "cuda_int_mm", 320 * GB, 15.75 * GB, (7, 5)),
        Device("3090", "RTX 3090", 23.7 * GIB, 35.6 * TERA, 284.0 * TERA, "cuda_int_mm", 936 * GB, 31.5 * GB, (8, 6)),
        Device("a100", "A100", 79.3 * GIB, 19.5 * TERA, 624.0 * TERA, "cuda_int_mm", 1935 * GB, 31.5 * GB, (8, 0)),
        Device("h100", "H100", 79.6 * GIB, 51.2 * TERA, 1513.0 * TERA, "cuda_int_mm", 2000 * GB, 63.0 * GB, (9, 0)),
    )
}  # fmt: skip
CPU = Device("cpu", "CPU", 0.0, 0.0, 0.0, "cpu", 0.0, 0.0, (0, 0))
"""Its memory is the host's; its rates are measured (`cpu_rates`)."""


def find_device(key: str) -> Device:
    """The device called `key` (`p40`, `GTX 1080 Ti`, `Tesla P40`, `cpu`). Raises ConfigError for an unknown one."""
    wanted = _plain(key)
    for device in (*DEVICES.values(), CPU):
        if wanted in (device.key, _plain(device.name)) or (wanted.endswith(device.key) and device is not CPU):
            return device
    names = [*DEVICES, "cpu", "auto"]
    raise ConfigError(f"--gpu {key}: the planner knows no such card; {nearest(wanted, names)}")


def recognise(driver_name: str, memory: float) -> Device | None:
    """The device that a driver names, with the memory that it has, or None."""
    for device in DEVICES.values():
        if device.name.split()[-1] in driver_name.replace("-", " ").split() or device.name in driver_name:
            return Device(**{**vars(device), "memory": memory})
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
