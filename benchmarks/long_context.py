"""Time per token of a mixer on short and on long rows: `python benchmarks/long_context.py [--quick] [--threads 2]`.

A scan costs the same per token whatever the row's length; softmax attention is measured beside it as the contrast.
Every step, forward and backward of one mixer of the Mini preset, has the same number of tokens: sixteen rows of 512 or
one of 8192. Rounds alternate between the lengths, and a ratio is the median over rounds of the ratio inside a round, so
a machine that other people use as well cancels out. `kept` is what the forward holds for the backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tbf.model.config import UltraConfig  # noqa: E402
from tbf.model.encoder import MINI_SHAPE  # noqa: E402
from tbf.model.layer import HybridLayer  # noqa: E402
from tbf.model.segment_info import SegmentInfo  # noqa: E402

WINDOW = 128
LINEAR = {"retnet": "retnet", "mamba": "mamba", "titan_local": "titan_attn:local"}  # name -> layer pattern
CONTRAST = {"standard_attn": "standard_attn", "titan_attn": "titan_attn"}
SHORT = 512


class Step:
    """Forward and backward of one mixer over `tokens` tokens in rows of `length`."""

    def __init__(self, pattern: str, length: int, tokens: int, ternary: bool) -> None:
        config = UltraConfig(**MINI_SHAPE, layer_pattern=[pattern], window=WINDOW, use_bitnet=ternary)
        torch.manual_seed(0)
        layer = HybridLayer(config, *config.layer_types[0])
        for module in layer.modules():
            if hasattr(module, "init_parameters"):
                module.init_parameters()
        self.mixer, self.norm = layer.mixer, partial(layer.mixer_norm, loop=0)
        self.x = torch.randn(tokens // length, length, config.hidden_size, requires_grad=True)
        self.info = SegmentInfo.build(config, torch.ones(self.x.shape[:2], dtype=torch.long))
        self.upstream = torch.randn_like(self.x)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.mixer(self.x, self.info, self.norm).backward(self.upstream)
        return time.perf_counter() - start

    def kept_bytes(self) -> int:
        """What the forward saves for the backward, storages counted once."""
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = self.mixer(self.x, self.info, self.norm)
        del y
        return sum(sizes.values())


def compare(pattern: str, lengths: list[int], tokens: int, rounds: int, ternary: bool) -> list[dict]:
    """One row per length: microseconds per token, ratio to the shortest length, bytes kept per token."""
    steps = {length: Step(pattern, length, tokens, ternary) for length in lengths}
    for step in steps.values():
        step.seconds()
    times = {length: [] for length in lengths}
    for _ in range(rounds):
        for length, step in steps.items():
            times[length].append(step.seconds())
    ratios = {length: median(t / s for t, s in zip(times[length], times[SHORT])) for length in lengths}
    return [
        {
            "length": length,
            "us_per_token": median(times[length]) / tokens * 1e6,
            "ratio_to_512": ratios[length],
            "kept_kb_per_token": steps[length].kept_bytes() / tokens / 1e3,
        }
        for length in lengths
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; contrast up to 2048 tokens only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="0: 21, or 7 with --quick")
    parser.add_argument("--fp32", action="store_true", help="FP32 projections instead of ternary ones")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (7 if options.quick else 21)
    longest = 8192

    rows, figures = [], {}
    for name, pattern in {**LINEAR, **CONTRAST}.items():
        contrast = name in CONTRAST
        lengths = [SHORT, 2048] if contrast and options.quick else [SHORT, 2048, longest]
        repeats = max(3, rounds // 4) if contrast else rounds
        for row in compare(pattern, lengths, longest, repeats, not options.fp32):
            rows.append({"mixer": name, **row})
            if row["length"] > SHORT:
                figures[f"{name}_{row['length']}_vs_{SHORT}"] = round(row["ratio_to_512"], 3)

    print(f"{'mixer':<15}{'row length':>11}{'us/token':>10}{'vs 512':>8}{'kept kB/token':>15}")
    for row in rows:
        print(
            f"{row['mixer']:<15}{row['length']:>11}{row['us_per_token']:>10.1f}{row['ratio_to_512']:>8.2f}"
            f"{row['kept_kb_per_token']:>15.1f}"
        )
    machine = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "ternary": not options.fp32,
        "rounds": rounds,
    }
    print(json.dumps({"benchmark": "long_context", "machine": machine, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
