"""Seconds of one optimizer step: every traced kernel at the slower of its arithmetic and its memory traffic.

On a card the rates are the vendor's, times the shares in `hardware.devices`; on this processor they are measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tbf.hardware.cpu_rates import CpuRates
from tbf.hardware.devices import DP4A_SHARE, GEMM_SHARE, KERNEL_LAUNCH_S, MEMORY_SHARE, PCIE_SHARE, TENSOR_SHARE, Device
from tbf.planning.activations import Activations
from tbf.planning.engine_state import Engine, ModelFacts
from tbf.planning.trace import Operation, Work
from tbf.planning.traffic import Traffic

ADAM_BYTES = 28
"""Read and written per parameter: weight, gradient and both moments in, three of them out."""
HOST_BANDWIDTH = 60e9
"""Of a host whose memory can't be measured from here: two sockets of four DDR4-2400 channels, as copies reach it."""
NVME_BANDWIDTH = 2e9
_FUNCTIONS = {
    "exp", "exp_", "erf", "tanh", "sigmoid", "silu", "silu_backward", "gelu", "gelu_backward", "log", "softplus",
    "softplus_backward", "pow", "_softmax", "_log_softmax", "rsqrt", "sqrt", "_softmax_backward_data",
    "_log_softmax_backward_data", "special_entr", "log1p", "expm1",
}  # fmt: skip
_STRIDED = {"clone", "_to_copy", "copy_", "cat"}
_NEAR_BYTES, _FAR_BYTES = 1 << 20, 32 << 20


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on each rank, part by part."""

    fp32: float
    int8: float
    memory: float
    launches: float
    pcie: float
    optimizer: float
    network: float
    nvme: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def step_time(
    activations: Activations,
    model: ModelFacts,
    engine: Engine,
    traffic: Traffic,
    *,
    device: Device,
    rates: CpuRates | None,
    ranks: int,
    local_ranks: int,
    network_bandwidth: float,
) -> StepTime:
    """`rates`: of the processor that trains, for one of its ranks; None on a card."""
    fp32 = int8 = memory = launches = 0.0
    for work in (activations.forward, activations.backward):
        parts = cpu_seconds(work, rates) if rates else card_seconds(work, device)
        fp32, int8, memory, launches = (a + b for a, b in zip((fp32, int8, memory, launches), parts))
    micro = engine.accumulation
    adam = ADAM_BYTES * model.total / ranks * (1.6 if engine.torch_adam else 1.0)
    if rates:
        optimizer = adam / rates.adam + 8 * model.total / rates.far
    elif engine.offload_optimizer != "none":
        optimizer = adam * local_ranks / HOST_BANDWIDTH
    else:
        optimizer = adam / (device.bandwidth * MEMORY_SHARE)
    return StepTime(
        fp32 * micro,
        int8 * micro,
        memory * micro,
        launches * micro,
        max(traffic.to_host, traffic.to_device) / (device.pcie * PCIE_SHARE) if device.on_cuda else 0.0,
        optimizer,
        traffic.network / network_bandwidth if ranks > 1 else 0.0,
        traffic.nvme / NVME_BANDWIDTH,
    )


def card_seconds(work: Work, device: Device) -> tuple[float, float, float, float]:
    """(FP32 products, INT8 products, memory traffic, launches) in seconds on a card."""
    bandwidth, flops = device.bandwidth * MEMORY_SHARE, device.fp32_flops * GEMM_SHARE
    share = DP4A_SHARE if device.int8_backend == "cuda_dp4a" else TENSOR_SHARE
    integer = device.int8_ops * share or flops
    fp32 = int8 = memory = launches = 0.0
    for op, count in work.items():
        moving = op.bytes / bandwidth
        if op.integer_ops:
            int8 += count * max(op.integer_ops / integer, moving)
        elif op.flops:
            fp32 += count * max(op.flops / flops, moving)
        else:
            memory += count * moving
        launches += count * max(0.0, KERNEL_LAUNCH_S - max(moving, op.flops / flops, op.integer_ops / integer))
    return fp32, int8, memory, launches


def cpu_seconds(work: Work, rates: CpuRates) -> tuple[float, float, float, float]:
    """The same on a processor with measured rates."""
    fp32 = int8 = memory = launches = 0.0
    for op, count in work.items():
        launches += count * rates.operator_s
        if op.integer_ops:
            int8 += count * op.integer_ops / rates.int8
        elif op.name.startswith("tbf_"):
            int8 += count * op.bytes / rates.quantise
        elif op.flops:
            rate = {"bmm": rates.batched_gemm, "baddbmm": rates.batched_gemm}.get(op.name, rates.gemm)
            rate = rates.attention if "scaled_dot_product" in op.name else rate
            fp32 += count * op.flops / rate
        else:
            memory += count * moving_seconds(op, rates)
    return fp32, int8, memory, launches


def moving_seconds(op: Operation, rates: CpuRates) -> float:
    """An operator without products, between cache and main memory by the size of what it touches."""
    distance = min(max((op.bytes - _NEAR_BYTES) / (_FAR_BYTES - _NEAR_BYTES), 0.0), 1.0)
    rate = 1.0 / ((1 - distance) / rates.near + distance / rates.far)
    if op.name in _STRIDED:
        rate = min(rate, rates.strided)
    seconds = op.bytes / rate
    return seconds + op.elements / rates.functions if op.name in _FUNCTIONS else seconds
