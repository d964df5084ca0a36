"""One whole training step through DeepSpeed, in every gradient mode and the ways it is usually done.

    python benchmarks/train_step.py [--quick] [--models mini slice] [--rounds 7] [--no-breakdown] [--no-memory]

`mini` has a vocabulary of 50,000; `slice` is two layers (retnet, titan_attn) of frankenstein_2048. Rows of 512 tokens,
activation checkpointing per layer, ZeRO-2 with the optimizer on the host. All variants of a model share one engine and
take turns in one run; medians are compared. The last line is one JSON object.

The breakdown profiles one step. Peak memory is that of a step, in a process of its own per variant, without activation
checkpointing: what is saved for the backward is then what makes the peak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.train.environment import choose_accelerator, discover_process, tune_allocator  # noqa: E402

choose_accelerator()
ALLOCATOR = tune_allocator()

import torch  # noqa: E402
from breakdown import time_by_part  # noqa: E402

from tbf.config import RunConfig, load_run_config  # noqa: E402
from tbf.model.bitlinear import BitLinear, invalidate_ternary, set_ternary_plan, ternary_shapes  # noqa: E402
from tbf.model.encoder import TormentedBertFrankenstein  # noqa: E402
from tbf.ops import ternary  # noqa: E402
from tbf.ops.ternary_backends import DEFAULT_MODE, GRADIENT_MODES, TernaryPlan  # noqa: E402
from tbf.ops.ternary_probe import choose_plan  # noqa: E402
from tbf.system import peak_memory, processor_name, reset_peak  # noqa: E402
from tbf.train import distributed  # noqa: E402
from tbf.train.build_ops import prepare_ops  # noqa: E402
from tbf.train.ds_config import load_ds_config  # noqa: E402
from tbf.train.optim import parameter_groups  # noqa: E402
from tbf.train.run import build_engine  # noqa: E402

TOKENS, MASKED = 512, 0.3
MODELS = {
    "mini": ("mini", ["model.vocab_size=50000"], 4),
    "slice": (
        "frankenstein_2048",
        ["model.vocab_size=50000", "model.num_layers=2", "model.layer_pattern=[retnet, titan_attn]"],
        2,
    ),
}
"""Preset, changes, rows of a micro batch."""
FAKE, FRESH, BARE = "fp32 fake-quant", f"{DEFAULT_MODE}, no cache", f"{DEFAULT_MODE}, no engine"
PLAIN_MALLOC = {"TBF_MALLOC": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Freed memory goes back at once, so that what is resident is what is used."""
DS_CONFIG = ROOT / "ds_configs" / "p40_zero2.json"


def make_run(name: str) -> RunConfig:
    preset, changes, rows = MODELS[name]
    return load_run_config(preset, [*changes, f"train.micro_batch_size={rows}", f"data.seq_len={TOKENS}"])


def make_batch(run: RunConfig) -> dict[str, torch.Tensor]:
    """Random tokens in full rows of two documents; the same for all variants."""
    generator = torch.Generator().manual_seed(0)
    rows, slots = run.train.micro_batch_size, round(MASKED * TOKENS)
    ids = torch.randint(5, run.model.vocab_size, (rows, TOKENS), generator=generator)
    places = torch.stack([torch.randperm(TOKENS, generator=generator)[:slots].sort().values for _ in range(rows)])
    return {
        "input_ids": ids,
        "segment_ids": 1 + (torch.arange(TOKENS) >= TOKENS // 2).long().expand(rows, -1),
        "masked_positions": places,
        "masked_labels": ids.gather(1, places),
    }


@contextlib.contextmanager
def as_variant(name: str, model: TormentedBertFrankenstein, plan: TernaryPlan) -> Iterator[None]:
    """Makes the model compute the way `name` says while the block runs."""
    mode = name.partition(",")[0]
    set_ternary_plan(model, TernaryPlan(plan.forward, plan.backward, mode if mode in GRADIENT_MODES else "fp32"))
    invalidate_ternary()
    kernels, handles = ternary.uses_kernels, []
    if name == FAKE:
        ternary.uses_kernels = lambda weight: False
    if name == FRESH:
        layers = [module for module in model.modules() if isinstance(module, BitLinear)]
        handles = [layer.register_forward_pre_hook(lambda *_: invalidate_ternary()) for layer in layers]
    try:
        yield
    finally:
        ternary.uses_kernels = kernels
        for handle in handles:
            handle.remove()


class Bench:
    """One model behind a DeepSpeed engine, and a second one without it."""

    def __init__(self, name: str, granularity: str = "layer", bare: bool = True) -> None:
        self.run = make_run(name)
        config, self.run = load_ds_config(DS_CONFIG, self.run, 1)
        device = torch.device("cpu")
        self.engine = build_engine(self.run, config, device, print)
        self.model: TormentedBertFrankenstein = self.engine.module
        self.model.set_activation_checkpointing(granularity)
        self.plan = choose_plan(device, ternary_shapes(self.model))
        self.batch = make_batch(self.run)
        self.tokens = self.batch["input_ids"].numel()
        self.engine.train()
        self.bare_step = self._without_engine(granularity) if bare else None

    def step(self) -> None:
        output = self.engine(**self.batch)
        self.engine.backward(output.loss)
        self.engine.step()

    def seconds(self, variant: str) -> float:
        """One step, after the plan was changed: the weights' ternary forms are made in it, as in training."""
        model, step = (self.bare, self.bare_step) if variant == BARE else (self.model, self.step)
        with as_variant(variant, model, self.plan):
            started = time.perf_counter()
            step()
            return time.perf_counter() - started

    def _without_engine(self, granularity: str) -> Callable[[], None]:
        """The same step in plain PyTorch: clipping and torch's fused AdamW, no DeepSpeed."""
        torch.manual_seed(self.run.train.seed)
        self.bare = TormentedBertFrankenstein(self.run.model)
        self.bare.set_activation_checkpointing(granularity)
        groups = [
            {k: v for k, v in group.items() if k != "name"}
            for group in parameter_groups(self.bare, self.run.train.weight_decay)
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.run.train.learning_rate, fused=True)

        def step() -> None:
            self.bare(**self.batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.bare.parameters(), self.run.train.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def measure(name: str, rounds: int, breakdown: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Tokens per second of every variant of a model, printed, with the breakdown of the default one."""
    bench = Bench(name, bare=name == "mini")
    variants = [FAKE, *GRADIENT_MODES, FRESH, *([BARE] if bench.bare_step else [])]
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_ in range(rounds + 1):
        for variant in variants:
            seconds = bench.seconds(variant)
            if round_:
                times[variant].append(seconds)
    rate = {variant: bench.tokens / median(values) for variant, values in times.items()}
    print(f"\n{name}: {bench.model.num_parameters():,} parameters, {bench.tokens} tokens a step")
    print(f"{'variant':24}{'tokens/s':>10}{'x fake-quant':>14}{'x fp32 gradients':>18}")
    for variant in variants:
        print(
            f"{variant:24}{rate[variant]:10.0f}{rate[variant] / rate[FAKE]:14.2f}{rate[variant] / rate['fp32']:18.2f}"
        )
    figures = {f"tokens_per_s@{name}": rate[DEFAULT_MODE], f"hilo_vs_fakequant@{name}": rate["int8_hilo"] / rate[FAKE]}
    figures[f"int8_vs_fakequant@{name}"] = rate["int8"] / rate[FAKE]
    if BARE in rate:
        figures[f"engine_share@{name}"] = 1 - rate[DEFAULT_MODE] / rate[BARE]
        print(f"share of the step that the engine adds: {figures[f'engine_share@{name}']:.1%}")
    row = {"model": name, "tokens_per_s": rate, "seconds": times}
    if breakdown:
        with as_variant(DEFAULT_MODE, bench.model, bench.plan):
            bench.step()
            row["breakdown_ms"] = parts = time_by_part(bench.step, bench.model, bench.engine)
        total = sum(parts.values())
        print(f"where the time goes, {DEFAULT_MODE}, {total:.0f} ms while profiled:")
        for part, ms in parts.items():
            print(f"  {part:28}{ms:9.1f} ms{ms / total:8.1%}")
    return row, figures


def step_memory(name: str, variant: str) -> None:
    """Prints by how many bytes one step raises this process' resident memory at its peak, gradients included."""
    bench = Bench(name, granularity="none", bare=False)
    bench.seconds(variant)  # Adam's moments and the buffers of the engine come with the first one
    before = reset_peak()
    bench.seconds(variant)
    print(peak_memory() - before)


def compare_memory(name: str) -> dict[str, float]:
    """Peak memory of a step with int8 saved activations and with the fake-quantised ones."""
    peaks = {}
    for variant in (FAKE, DEFAULT_MODE):
        command = [sys.executable, __file__, "--step-memory", name, variant]
        own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {key: value for key, value in os.environ.items() if key not in own}  # the child is a job of its own
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**env, **PLAIN_MALLOC})
        peaks[variant] = int(done.stdout.split()[-1]) / 1e9
    print(f"\n{name}: what a step adds to the peak memory, nothing recomputed")
    for variant, gigabytes in peaks.items():
        print(f"  {variant:24}{gigabytes:6.2f} GB")
    return {f"step_gb_{variant.replace(' ', '_')}@{name}": value for variant, value in peaks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="mini only, two rounds, no memory")
    parser.add_argument("--no-breakdown", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--step-memory", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare_ops(needs_cpu_adam=True)
    distributed.start(discover_process(), on_cpu=True)
    try:
        if arguments.step_memory:
            return step_memory(*arguments.step_memory)
        rows, figures = [], {}
        for name in ["mini"] if arguments.quick else arguments.models:
            row, found = measure(name, 2 if arguments.quick else arguments.rounds, not arguments.no_breakdown)
            rows.append(row)
            figures |= found
        if not (arguments.no_memory or arguments.quick) and "slice" in arguments.models:
            figures |= compare_memory("slice")
        machine = {
            "processor": processor_name(),
            "allocator": ALLOCATOR,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        print(json.dumps({"benchmark": "train_step", "machine": machine, "rows": rows, "figures": figures}))
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
