"""What int8 gradients cost in quality: one preset trained in every gradient mode, and with FP32 linears.

    python benchmarks/grad_modes.py --data CORPUS [--steps 1000] [--vocab-size 16000] [--modes int8_hilo fp32 ...]
    python benchmarks/grad_modes.py --quick

Every mode is a run of launch/train.py with the same seed, rows and masks, in a folder of its own under --out; started
again, the benchmark takes up the runs where they were cut off and leaves finished ones alone. --seeds adds runs with
other seeds, which tell how much of a difference is chance. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tbf.ops.ternary_backends import GRADIENT_MODES  # noqa: E402
from tbf.train.callbacks.csv import read_rows  # noqa: E402

PLAIN = "fp32 linears"
"""No ternary weights at all: what the quantised forward itself costs."""


def train(mode: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Trains, or goes on training, one mode; returns its run folder."""
    run_dir = arguments.out / f"{mode.replace(' ', '-')}-{seed}"
    settings = {
        "train.seed": seed,
        "train.micro_batch_size": arguments.rows,
        "train.warmup_steps": arguments.steps // 10,
        "train.eval_every": max(1, arguments.steps // 4),
        "train.eval_rows": arguments.eval_rows,
        "train.save_every": max(1, arguments.steps // 5),
        "train.export_at_end": "false",
        "train.tensorboard": "false",
        "data.seq_len": arguments.seq_len,
        "data.vocab_size": arguments.vocab_size,
        **({"model.use_bitnet": "false"} if mode == PLAIN else {}),
    }
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds_config", str(arguments.ds_config)]
    command += ["--preset", arguments.preset, "--data", arguments.data, "--run-dir", str(run_dir)]
    command += ["--max-steps", str(arguments.steps)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    kernel = {} if mode == PLAIN else {"TBF_KERNEL": f"auto:{mode}"}
    subprocess.run(command, env={"DS_ACCELERATOR": "cpu", **os.environ, **kernel}, check=True)
    return run_dir


def outcome(run_dir: Path) -> dict[str, list[float] | float]:
    """Validation losses along the run, the last one, and how much of the time the steps took."""
    rows = [row for row in read_rows(run_dir / "metrics.csv") if row["superseded"] != "1"]
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    return {
        "val_losses": losses,
        "val_loss": losses[-1],
        "val_masked_accuracy": float([row["val_masked_accuracy"] for row in rows if row["val_masked_accuracy"]][-1]),
        "skipped": float(rows[-1]["skipped"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample", help="corpus (default: the embedded sample)")
    parser.add_argument("--out", type=Path, default=Path("runs/grad_modes"), help="folder of the runs")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "p40_zero2.json")
    parser.add_argument("--modes", nargs="+", default=[*GRADIENT_MODES, PLAIN], choices=[*GRADIENT_MODES, PLAIN])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=4, help="rows a step (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=16_000)
    parser.add_argument("--eval-rows", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="20 steps on the sample: shows that it works, no more")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.data, arguments.vocab_size, arguments.steps, arguments.eval_rows = "sample", 4096, 20, 16
    results = [
        {"mode": mode, "seed": seed, **outcome(train(mode, seed, arguments))}
        for seed in arguments.seeds
        for mode in arguments.modes
    ]
    losses = {mode: mean(row["val_loss"] for row in results if row["mode"] == mode) for mode in arguments.modes}
    base = losses.get("fp32")
    tokens = arguments.rows * arguments.seq_len
    print(f"\n{arguments.preset}, {arguments.steps} steps of {tokens} tokens, {len(arguments.seeds)} seed(s)")
    print(f"{'gradients':16}{'val loss':>10}{'accuracy':>10}{'against fp32 gradients':>26}{'skipped':>9}")
    for mode in arguments.modes:
        rows = [row for row in results if row["mode"] == mode]
        accuracy, skipped = mean(row["val_masked_accuracy"] for row in rows), sum(row["skipped"] for row in rows)
        against = f"{100 * (losses[mode] / base - 1):+.2f} %" if base else ""
        print(f"{mode:16}{losses[mode]:10.4f}{accuracy:10.4f}{against:>26}{skipped:9.0f}")
    figures = {f"val_loss@{mode}": loss for mode, loss in losses.items()}
    figures |= {f"excess@{mode}": loss / base - 1 for mode, loss in losses.items()} if base else {}
    machine = {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "grad_modes", "machine": machine, "rows": results, "figures": figures}))


if __name__ == "__main__":
    main()
