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
TORCH_ADAM_BYTES = 128
"""The same by torch's AdamW, one operator after another, with DeepSpeed's norm and copies before and after it."""
TERNARISE_BYTES = 12
"""Per weight, on a card: read for its scale, read again, and written in two layouts."""
HOST_BANDWIDTH = 60e9
"""Of a host whose memory can't be measured from here: two sockets of four DDR4-2400 channels, as copies reach it."""
NVME_BANDWIDTH = 2e9
ETHERNET_SHARE = 1448 / 1538
"""Of a full frame what TCP carries: MTU 1500, less headers, checksum, preamble and gap."""
_FUNCTIONS = {
    "exp", "exp_", "erf", "tanh", "sigmoid", "silu", "silu_backward", "gelu", "gelu_backward", "log", "softplus",
    "softplus_backward", "pow", "_softmax", "_log_softmax", "rsqrt", "sqrt", "_softmax_backward_data",
    "_log_softmax_backward_data", "special_entr", "log1p", "expm1",
}  # fmt: skip
_STRIDED = {"clone", "_to_copy", "copy_", "cat"}


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
    slowdown: float,
    ranks: int,
    local_ranks: int,
    network: tuple[float, float],
) -> StepTime:
    """`rates`: of the processor that trains, for one of its ranks; None on a card. `slowdown`: of operators without
    products in a pass, against one by one. `network`: bytes per second between ranks, and seconds that a message takes.
    Nothing is taken to overlap: a looped layer's gradients come last."""
    work = activations.forward + activations.backward
    fp32, int8, memory, launches = cpu_seconds(work, rates) if rates else card_seconds(work, device)
    memory, launches = slowdown * memory, slowdown * launches
    micro = engine.accumulation
    handed, updated = engine_bytes(engine, model.total, ranks)
    on_host = engine.offload_optimizer != "none"
    if rates:
        copied = 2 * traffic.network * ranks / (ranks - 1) if ranks > 1 else 0.0  # by gloo, to flat tensors and back
        optimizer = slowdown * (handed + copied) / rates.moving + updated / rates.adam * (1.0 if on_host else slowdown)
        int8_once = 4 * activations.ternary_weights / rates.ternarise
    else:
        bandwidth = device.bandwidth * MEMORY_SHARE
        optimizer = handed / bandwidth + updated * (local_ranks / HOST_BANDWIDTH if on_host else 1 / bandwidth)
        int8_once = TERNARISE_BYTES * activations.ternary_weights / bandwidth
    return StepTime(
        fp32 * micro,
        int8 * micro + int8_once,
        memory * micro,
        launches * micro,
        max(traffic.to_host, traffic.to_device) / (device.pcie * PCIE_SHARE) if device.on_cuda else 0.0,
        optimizer,
        traffic.network / network[0] + traffic.hops * network[1] if ranks > 1 else 0.0,
        traffic.nvme / NVME_BANDWIDTH,
    )


def engine_bytes(engine: Engine, parameters: int, ranks: int) -> tuple[float, float]:
    """What DeepSpeed 0.19.8 reads and writes in an optimizer step on each rank, beside the network: while it takes the
    gradients over (copies to and from the bucket, averaging, adding up, norms), and while it updates.

    Counted operator by operator; a test repeats the count.
    """
    micro, offload = engine.accumulation, engine.offload_optimizer != "none"
    if engine.stage == 3:
        whole, share = (28 if ranks == 1 else 42) * micro, 24 * micro + 12 * (micro - 1)
    elif engine.stage == 2:
        whole, share = 16 * micro, 16 * micro + (28 if offload else 12) * (micro - 1)
    else:
        whole, share = 16 + 12 * (micro - 1), 16
    if offload:
        share += 28
        update = ADAM_BYTES + (16 if engine.stage == 3 else 24)
    else:
        update = TORCH_ADAM_BYTES
    return parameters * (whole + share / ranks), parameters * update / ranks


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
        moving = op.bytes / rates.moving
        if op.integer_ops:
            int8 += count * (op.integer_ops / rates.int8 + moving)
        elif op.name == "tbf_quantise_gradient":
            int8 += count * op.bytes / rates.quantise_gradient
        elif op.name.startswith("tbf_"):
            int8 += count * op.bytes / rates.quantise
        elif op.flops:
            rate = {"bmm": rates.batched_gemm, "baddbmm": rates.batched_gemm}.get(op.name, rates.gemm)
            rate = rates.attention if "scaled_dot_product" in op.name else rate
            fp32 += count * op.flops / rate
        else:
            memory += count * _moving_seconds(op, rates)
    return fp32, int8, memory, launches


def _moving_seconds(op: Operation, rates: CpuRates) -> float:
    """An operator without products."""
    seconds = op.bytes / (min(rates.moving, rates.strided) if op.name in _STRIDED else rates.moving)
    return seconds + op.elements / rates.functions if op.name in _FUNCTIONS else seconds
