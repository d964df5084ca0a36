"""How much longer operators without products take in a real pass on this processor than one by one.

Measured alone, an operator finds its code, its threads and much of its data at hand. In a training step it follows
another one, and autograd's bookkeeping lies between the two. A pass of a small model shows what that costs. Matrix
products, which are at work for longer, hardly feel it.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from tbf.hardware.cpu_rates import CpuRates, kept_on_disk
from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.ops.ternary_probe import default_plan
from tbf.planning.activations import activations
from tbf.planning.timing import cpu_seconds
from tbf.planning.visits import PieceTracer, Shape

CONFIG = UltraConfig(
    hidden_size=1024, num_layers=4, num_loops=1, num_heads=8, retention_heads=8, vocab_size=4096,
    layer_pattern=("retnet", "titan_attn", "mamba", "ode"),
)  # fmt: skip
SHAPE = Shape(1, 256, 77)
_PASSES = 3


def pass_factor(rates: CpuRates, *, refresh: bool = False) -> float:
    """Seconds of operators without products in a real pass, over those that `rates` give for them; at least 1.

    `rates`: of one process with all of its threads. From disk, or measured in some seconds.
    """
    found = kept_on_disk("pass-factor", {"factor"}, rates.threads, lambda: {"factor": _measure(rates)}, refresh=refresh)
    return max(1.0, found["factor"])


def _measure(rates: CpuRates) -> float:
    plan = default_plan(torch.device("cpu"))
    traced = activations(PieceTracer(on_cuda=False), CONFIG, SHAPE, plan, "none", loops=1)
    fp32, int8, memory, launches = cpu_seconds(traced.forward + traced.backward, rates)
    with torch.random.fork_rng(devices=[]):
        model = TormentedBertFrankenstein(CONFIG)
    return (_seconds_of_a_pass(model) - fp32 - int8) / (memory + launches)


def _seconds_of_a_pass(model: TormentedBertFrankenstein) -> float:
    ids = torch.zeros(SHAPE.rows, SHAPE.tokens, dtype=torch.int64)
    places = torch.arange(SHAPE.slots).expand(SHAPE.rows, -1)
    times = []
    for _ in range(_PASSES + 1):
        model.zero_grad()
        start = time.perf_counter()
        model(ids, masked_positions=places, masked_labels=places).loss.backward()
        times.append(time.perf_counter() - start)
    return median(times[1:])  # the first one makes the weights ternary
