"""Bytes that leave a rank in one optimizer step: over PCIe, over the network and to NVMe.

From DeepSpeed 0.19.8's code: ZeRO-2 reduces after every micro-batch (as all-reduce of the bucket) and, with the
optimizer on the host, carries the accumulated gradients to the card and back each time; ZeRO-1 does both once a step.
ZeRO-3 gathers a layer when it runs and lets go of all of them between forward and backward; those below the persistence
threshold it gathers once a step. benchmarks/communication.py holds the network's part to the counters of network cards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tbf.planning.engine_state import FLOAT, Engine, ModelFacts, on_disk, shares_of


@dataclass(frozen=True)
class Traffic:
    """Per rank and optimizer step."""

    to_host: int
    to_device: int
    network: int
    """Sent (and as much received) to other ranks."""
    nvme: int
    """Read and written."""
    hops: int = 0
    """Messages between ranks that wait for the one before: each costs the network's latency."""


_SMALL_SUMS = 5
"""All-reduces of a few numbers in a step: two of the trainer; norm, overflow and clipping of the engine."""


def step_traffic(
    model: ModelFacts, engine: Engine, ranks: int, loops: int, kept_on_host: int, on_cuda: bool
) -> Traffic:
    """`kept_on_host`: bytes of activations that each micro-batch sends to the host."""
    whole = FLOAT * model.total
    share, micro = whole // ranks, engine.accumulation
    to_host = to_device = nvme = 0
    ring = whole * (ranks - 1) // ranks  # what a ring of ranks passes on for one gathering or scattering
    around = ranks - 1  # messages in a row that one gathering or scattering is; an all-reduce is both
    buckets = math.ceil(model.total / engine.reduce_bucket)
    if engine.offload_optimizer != "none":
        each = 1 if engine.stage == 1 else micro
        to_host += share * (each + (1 if each > 1 else 0))
        to_device += share * (each - 1) + share
        if engine.stage == 3:
            to_device += share * (micro - 1)
    if engine.stage == 1:
        network, hops = 3 * ring, (2 * buckets + 1) * around
    elif engine.stage == 2:
        network, hops = (2 * micro + 1) * ring, (2 * buckets * micro + 1) * around
    else:
        gathers = 3 if engine.granularity != "none" else 2
        per_micro = 2 if engine.max_live >= model.total else gathers * loops
        small = FLOAT * model.small * (ranks - 1) // ranks
        network = micro * (per_micro * (ring - small) + ring) + small
        layers = sum(size >= engine.persistence for size in model.sizes)
        hops = (micro * (per_micro * layers + buckets) + 1) * around
        if engine.offload_param != "none":
            to_device += micro * per_micro * share
            to_host += share
    if engine.offload_param == "nvme":
        swapped = on_disk(model.sizes, engine.sub_group, ranks, engine.max_in_cpu)
        nvme += (micro * per_micro + 1) * FLOAT * shares_of(swapped, ranks)
    if engine.offload_optimizer == "nvme":
        nvme += 2 * 3 * share + 2 * share
    if engine.cpu_checkpointing:
        to_host += micro * kept_on_host
        to_device += micro * kept_on_host
    if not on_cuda:
        to_host = to_device = 0
    return Traffic(to_host, to_device, network, nvme, hops + 2 * _SMALL_SUMS * around)
