"""Bytes that leave a rank in one optimizer step: over PCIe, over the network and to NVMe.

From DeepSpeed 0.19.8's code: ZeRO-2 reduces after every micro-batch (as all-reduce of the bucket) and, with the
optimizer on the host, carries the accumulated gradients to the card and back each time; ZeRO-1 does both once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from tbf.planning.engine_state import FLOAT, Engine, ModelFacts


@dataclass(frozen=True)
class Traffic:
    """Per rank and optimizer step."""

    to_host: int
    to_device: int
    network: int
    """Sent (and as much received) to other ranks."""
    nvme: int
    """Read and written."""


def step_traffic(
    model: ModelFacts, engine: Engine, ranks: int, loops: int, kept_on_host: int, on_cuda: bool
) -> Traffic:
    """`kept_on_host`: bytes of activations that each micro-batch sends to the host."""
    whole = FLOAT * model.total
    share, micro = whole // ranks, engine.accumulation
    to_host = to_device = nvme = 0
    ring = whole * (ranks - 1) // ranks  # what a ring of ranks passes on for one gathering or scattering
    if engine.offload_optimizer != "none":
        each = 1 if engine.stage == 1 else micro
        to_host += share * (each + (1 if each > 1 else 0))
        to_device += share * (each - 1) + share
        if engine.stage == 3:
            to_device += share * (micro - 1)
    if engine.stage == 1:
        network = 3 * ring
    elif engine.stage == 2:
        network = (2 * micro + 1) * ring
    else:
        gathers = 3 if engine.granularity != "none" else 2
        per_micro = gathers * (1 if engine.max_live >= model.total else loops)
        network = micro * (per_micro + 1) * ring
        if engine.offload_param != "none":
            to_device += micro * per_micro * share
            to_host += share
    if engine.offload_param == "nvme":
        nvme += micro * per_micro * share + share
    if engine.offload_optimizer == "nvme":
        nvme += 2 * 3 * share + 2 * share
    if engine.cpu_checkpointing:
        to_host += micro * kept_on_host
        to_device += micro * kept_on_host
    if not on_cuda:
        to_host = to_device = 0
    return Traffic(to_host, to_device, network, nvme)
