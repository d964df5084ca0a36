"""Gradient health: `python benchmarks/stability.py [--quick] [--ode] [--presets mini ...] [--steps 200] [--threads 1]`.

Trains the small twin of every preset (its layers, loops and pattern at width 128) on the embedded sample with the
preset's learning rate, and prints the largest gradient norm before clipping and how many steps were skipped.
The schedule is squeezed into the run: the full rate comes after 20 steps. Groups, schedule and clipping are the
trainer's, the optimizer is torch's AdamW.

--ode measures the ODE mixer alone instead: how much longer or shorter a gradient gets on its way through the layer, as
the weights grow. `bounded` is the mixer with tau = 0.1, as it starts; `tau=1` the same with a tau ten times that;
`unbounded` its attention without the RMS and tau around it.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.train.environment import tune_allocator  # noqa: E402

tune_allocator()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tbf.config import RunConfig, load_run_config, preset_names  # noqa: E402
from tbf.data.loader import BatchLoader, PackedDataset  # noqa: E402
from tbf.data.masking import MaskSpec  # noqa: E402
from tbf.data.prepare import prepare_data  # noqa: E402
from tbf.model.config import UltraConfig  # noqa: E402
from tbf.model.encoder import TormentedBertFrankenstein  # noqa: E402
from tbf.model.mixers.ode_attention import OdeAttention  # noqa: E402
from tbf.model.norms import rms  # noqa: E402
from tbf.model.segment_info import SegmentInfo  # noqa: E402
from tbf.ops.rk4 import integrate  # noqa: E402
from tbf.train.optim import parameter_groups  # noqa: E402
from tbf.train.schedule import learning_rate, weight_decay  # noqa: E402

WIDTH = 128
TOKENS = 128
ROWS = 8
FIELDS = ("bounded", "tau=1", "unbounded")
LIMIT = 10.0
"""A gradient norm that no preset may pass."""


def small_twin(preset: str, steps: int) -> RunConfig:
    """The preset at width 128 on short rows of the sample; experts and FFNs are as wide relative to the model."""
    run = load_run_config(preset)
    model = run.model
    shape = {
        "hidden_size": WIDTH,
        "num_heads": 4,
        "retention_heads": 4,
        "factorized_embedding_dim": 64,
        "ffn_hidden_size": model.ffn_size * WIDTH // model.hidden_size,
    }
    return run.replace(
        model=shape,
        data={"source": "sample", "vocab_size": 0, "seq_len": TOKENS, "num_workers": 0},
        train={"max_steps": steps, "warmup_steps": min(20, steps // 5), "micro_batch_size": ROWS},
    )


def train(run: RunConfig) -> dict[str, float]:
    """Trains the model of `run`; returns the first and last losses and what its gradients did."""
    shards, tokenizer = prepare_data(
        run.data, None, run.data.cache_dir, vocab_size=run.data.wanted_vocab_size, progress=False
    )
    run = run.replace(model={"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_id})
    mask = MaskSpec.for_tokenizer(tokenizer, run.data.mask_rate, seed=run.train.seed)
    loader = iter(BatchLoader(PackedDataset(shards, seq_len=TOKENS, seed=run.train.seed), mask, micro_batch=ROWS))
    torch.manual_seed(run.train.seed)
    model = TormentedBertFrankenstein(run.model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, run.train.weight_decay),
        lr=run.train.learning_rate,
        betas=(run.train.beta1, run.train.beta2),
        eps=run.train.adam_eps,
    )
    losses, norms, skipped, started = [], [], 0, time.perf_counter()
    for step in range(run.train.max_steps):
        decayed, undecayed = optimizer.param_groups
        decayed["lr"] = undecayed["lr"] = learning_rate(step, run.train)
        decayed["weight_decay"] = weight_decay(step, run.train)
        output = model(**next(loader)[0])
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.gradient_clipping).item()
        if math.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        losses.append(output.mlm_loss.item())
        norms.append(norm)
    return {
        "parameters": model.num_parameters(),
        "learning_rate": run.train.learning_rate,
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "max_grad_norm": max(norms),
        "at_step": norms.index(max(norms)) + 1,
        "median_grad_norm": median(norms),
        "skipped": skipped,
        "seconds": time.perf_counter() - started,
    }


def presets_table(presets: list[str], steps: int) -> tuple[list[dict], dict[str, float]]:
    """Trains, prints a line per preset as it is done, and returns (rows, figures)."""
    print(f"{steps} steps of {ROWS} rows of {TOKENS} tokens, width {WIDTH}")
    print(f"{'preset':<24}{'lr':>9}{'loss':>16}{'max norm':>10}{'at step':>9}{'median':>8}{'skipped':>9}{'seconds':>9}")
    rows, figures = [], {}
    for preset in presets:
        row = {"preset": preset, **train(small_twin(preset, steps))}
        losses = f"{row['first_loss']:.2f} -> {row['last_loss']:.2f}"
        print(
            f"{preset:<24}{row['learning_rate']:>9.0e}{losses:>16}{row['max_grad_norm']:>10.2f}{row['at_step']:>9}"
            f"{row['median_grad_norm']:>8.2f}{row['skipped']:>9}{row['seconds']:>9.0f}",
            flush=True,
        )
        rows.append(row)
        figures |= {f"max_grad_norm@{preset}": row["max_grad_norm"], f"skipped@{preset}": row["skipped"]}
    return rows, figures


def gradient_gain(mixer: OdeAttention, config: UltraConfig, field: str, draws: int) -> float:
    """Largest |J^T g| / |g| of x + increment over some unit-RMS x and random g."""
    info = SegmentInfo.build(config, torch.ones(2, TOKENS, dtype=torch.long))

    def unbounded(z: Tensor, stage: int) -> Tensor:
        return mixer.mix(rms(z), info)

    def increment(x: Tensor) -> Tensor:
        if field == "unbounded":
            return integrate(unbounded, x, solver=config.ode_solver, steps=config.ode_steps)
        return mixer(x, info, rms)

    gains = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, TOKENS, config.hidden_size, generator=generator).requires_grad_()
        upstream = torch.randn(x.shape, generator=generator)
        (gradient,) = torch.autograd.grad(x + increment(x), x, upstream)
        gains.append((gradient.norm() / upstream.norm()).item())
    return max(gains)


def ode_table(draws: int) -> tuple[list[dict], dict[str, float]]:
    """Prints the gain for each field, solver and number of steps over growing weights; returns (rows, figures)."""
    scales = (1, 3, 6, 10)
    print(f"gradient gain of an ODE layer of width 384, FP32, {TOKENS} tokens, the worst of {draws} draws")
    print(f"{'field':<12}{'solver':<8}{'steps':>6}" + "".join(f"{f'weights x{scale}':>14}" for scale in scales))
    rows, figures = [], {}
    for field in FIELDS:
        for solver in ("rk4", "euler"):
            for steps in (1, 2):
                config = UltraConfig(
                    hidden_size=384, num_heads=6, layer_pattern=("ode",), num_loops=1, use_bitnet=False,
                    ode_solver=solver, ode_steps=steps,
                )  # fmt: skip
                gains = []
                for scale in scales:
                    torch.manual_seed(0)
                    mixer = OdeAttention(config)
                    with torch.no_grad():
                        for projection in (mixer.qkv_proj, mixer.out_proj):
                            torch.nn.init.trunc_normal_(projection.weight, std=0.02 * scale, a=-1.0, b=1.0)
                        if field == "tau=1":
                            mixer.tau.fill_(1.0)
                    gains.append(gradient_gain(mixer, config, field, draws))
                print(f"{field:<12}{solver:<8}{steps:>6}" + "".join(f"{gain:>14.3g}" for gain in gains))
                rows.append({"field": field, "solver": solver, "steps": steps, "gain": dict(zip(scales, gains))})
                figures |= {f"{field}_gain@{solver}x{steps},weights_x{s}": g for s, g in zip(scales, gains)}
    return rows, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 steps of mini and mini_moe; with --ode, one draw")
    parser.add_argument("--ode", action="store_true", help="the gain of the ODE layer instead of training")
    parser.add_argument("--presets", nargs="+", default=None, choices=preset_names())
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.ode:
        rows, figures = ode_table(draws=1 if arguments.quick else 5)
        passed = all(gain <= 1.3 for name, gain in figures.items() if name.startswith("bounded"))
    else:
        presets = arguments.presets or (["mini", "mini_moe"] if arguments.quick else preset_names())
        rows, figures = presets_table(presets, 30 if arguments.quick else arguments.steps)
        passed = all(row["max_grad_norm"] <= LIMIT and row["skipped"] == 0 for row in rows)
        print(f"gradient norms at most {LIMIT:g} and no step skipped: {'yes' if passed else 'NO'}")
    machine = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": arguments.threads,
    }
    print(json.dumps({"benchmark": "stability", "machine": machine, "rows": rows, "figures": figures}))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
