"""Peak memory and time of a step by activation checkpointing granularity and number of loops.

    python benchmarks/checkpointing.py [--quick] [--loops 2 4 6] [--rounds 1]

The model is two layers (retnet, titan_attn) of frankenstein_2048 with a small vocabulary, one row of 512 tokens,
forward and backward in plain PyTorch. Memory is the peak of resident memory above what the model and its gradients
hold, read from the kernel. From two loops on it holds the gradients twice, since autograd adds up those of a shared
weight before it hands them on; so growth is counted from two loops on. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tbf.config import load_run_config  # noqa: E402
from tbf.model.bitlinear import set_ternary_plan, ternary_shapes  # noqa: E402
from tbf.model.encoder import TormentedBertFrankenstein  # noqa: E402
from tbf.ops.ternary_probe import choose_plan  # noqa: E402
from tbf.system import peak_memory, processor_name, reset_peak  # noqa: E402

ROWS, TOKENS, VOCABULARY = 1, 512, 1024
CHANGES = ["model.num_layers=2", "model.layer_pattern=[retnet, titan_attn]", f"model.vocab_size={VOCABULARY}"]
MB = 1e6


def map_large_blocks() -> None:
    """Has glibc give every freed block from 128 KB on back at once, so that the peak is what is really held."""
    threshold, limit = -3, 128 * 1024  # M_MMAP_THRESHOLD of mallopt(3)
    ctypes.CDLL(None).mallopt(threshold, limit)


def measure(model: TormentedBertFrankenstein, loops: int, rounds: int) -> tuple[float, float]:
    """(MB at the peak above the start, seconds) of a forward and backward; the first one only warms up."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator)
    places = torch.arange(0, TOKENS, 3).expand(ROWS, -1)
    batch = {"input_ids": ids, "masked_positions": places, "masked_labels": ids.gather(1, places)}
    peaks, seconds = [], []
    for round_ in range(rounds + 1):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # kept: gradients belong to the start
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before, started = reset_peak(), time.perf_counter()
        model(**batch, num_loops=loops).loss.backward()
        if round_:
            seconds.append(time.perf_counter() - started)
            peaks.append((peak_memory() - before) / MB)
    return median(peaks), median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", nargs="+", type=int, default=[2, 4, 6])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two loop counts, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.loops, arguments.rounds = [2, 3], 1
    map_large_blocks()
    torch.manual_seed(0)
    model = TormentedBertFrankenstein(load_run_config("frankenstein_2048", CHANGES).model)
    set_ternary_plan(model, choose_plan(torch.device("cpu"), ternary_shapes(model)))
    state = ROWS * TOKENS * model.config.hidden_size * 4 / MB
    print(f"one residual state is {state:.1f} MB; a layer visit keeps one under `layer`, a loop one under `loop`")
    print(f"{'granularity':12}" + "".join(f"{f'{n} loops MB':>14}{'s':>7}" for n in arguments.loops) + "   MB a loop")
    rows, figures = [], {}
    for granularity in ("none", "layer", "loop"):
        model.set_activation_checkpointing(granularity)
        found = [measure(model, loops, arguments.rounds) for loops in arguments.loops]
        growth = (found[-1][0] - found[0][0]) / (arguments.loops[-1] - arguments.loops[0])
        print(f"{granularity:12}" + "".join(f"{mb:14.0f}{s:7.2f}" for mb, s in found) + f"{growth:12.1f}")
        rows.append({"granularity": granularity, "loops": arguments.loops, "mb_and_seconds": found})
        figures[f"mb_per_loop@{granularity}"] = growth
    figures["state_mb"] = state
    machine = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "checkpointing", "machine": machine, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
