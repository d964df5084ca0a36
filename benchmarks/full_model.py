"""A few optimizer steps of a whole preset through DeepSpeed, on one repeated batch: does it run, learn, and fit?

    python benchmarks/full_model.py [frankenstein_2048] [--ds_config FILE] [--steps 4] [--rows 1] [--seq-len 512]
    python benchmarks/full_model.py frankenstein_2048 --set model.use_moe=false
    python benchmarks/full_model.py --quick

Prints the loss and the seconds of every step and the peak of resident memory, and fails unless the loss is finite and
falls. Tokens are random, the same in every step. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.train.environment import choose_accelerator, discover_process, set_threads, tune_allocator  # noqa: E402

CPU_REASON = choose_accelerator()
tune_allocator()

import psutil  # noqa: E402
import torch  # noqa: E402

from tbf.config import load_run_config  # noqa: E402
from tbf.system import peak_memory, processor  # noqa: E402
from tbf.train import distributed  # noqa: E402
from tbf.train.build_ops import prepare_ops  # noqa: E402
from tbf.train.ds_config import load_ds_config  # noqa: E402
from tbf.train.run import build_engine  # noqa: E402


def random_batch(vocabulary: int, rows: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, every third of them to be predicted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    places = torch.arange(0, tokens, 3).expand(rows, -1).contiguous()
    batch = {"input_ids": ids, "masked_positions": places, "masked_labels": ids.gather(1, places)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="frankenstein_2048")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "p40_zero2.json")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--quick", action="store_true", help="the mini preset, short rows")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.preset, arguments.seq_len = "mini", 64
    settings = [f"train.micro_batch_size={arguments.rows}", f"data.seq_len={arguments.seq_len}"]
    settings.append("train.gradient_accumulation_steps=1")
    run = load_run_config(arguments.preset, [*settings, *arguments.overrides])
    process = discover_process()
    threads = set_threads(process)
    torch.set_num_threads(threads)
    config, run = load_ds_config(arguments.ds_config, run, process.world_size)
    prepare_ops(config.needs_cpu_adam, print)
    device = distributed.start(process, on_cpu=bool(CPU_REASON))
    steps, imported = [], psutil.Process().memory_info().rss
    try:
        started = time.perf_counter()
        engine = build_engine(run, config, device, print)
        engine.train()
        built = time.perf_counter() - started
        state = psutil.Process().memory_info().rss - imported
        print(f"{run.preset}: {engine.module.num_parameters():,} parameters, engine ready in {built:.0f} s, "
              f"{state / 1e9:.2f} GB of state", flush=True)  # fmt: skip
        batch = random_batch(run.model.vocab_size, arguments.rows, arguments.seq_len, device)
        for step in range(arguments.steps):
            started = time.perf_counter()
            loss = engine(**batch).loss
            forward = time.perf_counter() - started
            engine.backward(loss)
            backward = time.perf_counter() - started - forward
            engine.step()
            total = time.perf_counter() - started
            steps.append({"loss": loss.item(), "seconds": total, "applied": bool(engine.was_step_applied())})
            print(f"step {step + 1}  loss {loss.item():.4f}  {total:.1f} s (forward {forward:.1f}, backward "
                  f"{backward:.1f}, optimizer {total - forward - backward:.1f})  peak {peak_memory() / 1e9:.2f} GB",
                  flush=True)  # fmt: skip
    finally:
        distributed.stop()
    losses = [step["loss"] for step in steps]
    good = all(map(math.isfinite, losses)) and losses[-1] < losses[0] and all(step["applied"] for step in steps)
    print("finite and falling" if good else "the loss is not finite or does not fall")
    figures = {
        "peak_gb": peak_memory() / 1e9,
        "state_gb": state / 1e9,
        "seconds_per_step": min(step["seconds"] for step in steps),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    machine = {
        "processor": processor().partition("model name")[2].partition("\n")[0].strip("\t :"),
        "threads": threads,
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "full_model", "machine": machine, "rows": steps, "figures": figures}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
