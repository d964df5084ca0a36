"""A few optimizer steps of a whole preset through DeepSpeed, on one repeated batch: does it run, learn, and fit?

    python benchmarks/full_model.py [frankenstein_2048] [--ds_config FILE] [--steps 4] [--rows 1] [--seq-len 512]
    python benchmarks/full_model.py frankenstein_2048_moe --nvme DIR --seq-len 128
    python benchmarks/full_model.py --quick

Prints the loss and the seconds of every step, the peak of resident memory beside the plan's and what went over the
disk, and fails unless the loss is finite and falls. `--nvme` keeps weights and optimizer in a folder, in as little
memory as that takes. Tokens are random, the same in every step. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.train.environment import choose_accelerator, discover_process, set_threads, tune_allocator  # noqa: E402

CPU_REASON = choose_accelerator()
tune_allocator()

import psutil  # noqa: E402
import torch  # noqa: E402

from tbf.config import RunConfig, load_run_config  # noqa: E402
from tbf.model.flops import build_meta  # noqa: E402
from tbf.planning.engine_state import model_facts  # noqa: E402
from tbf.planning.machine import choose_machine  # noqa: E402
from tbf.planning.plan import Planner  # noqa: E402
from tbf.system import disk_traffic, peak_memory, processor_name  # noqa: E402
from tbf.train import distributed  # noqa: E402
from tbf.train.build_ops import prepare_ops  # noqa: E402
from tbf.train.deepspeed_io import engine_facts  # noqa: E402
from tbf.train.ds_config import EngineConfig, load_ds_config  # noqa: E402
from tbf.train.ds_keys import nvme_folders  # noqa: E402
from tbf.train.run import build_engine  # noqa: E402


def random_batch(vocabulary: int, rows: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, every third of them to be predicted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    places = torch.arange(0, tokens, 3).expand(rows, -1).contiguous()
    batch = {"input_ids": ids, "masked_positions": places, "masked_labels": ids.gather(1, places)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def lean_nvme(folder: Path, largest: int) -> dict[str, Any]:
    """p40_zero3_nvme.json for a small host: no weights kept in memory, smaller groups and buffers."""
    config = json.loads((ROOT / "ds_configs" / "p40_zero3_nvme.json").read_text())
    zero, disk = config["zero_optimization"], {"device": "nvme", "nvme_path": str(folder)}
    zero["offload_optimizer"] = {**disk, "buffer_count": 4}
    zero["offload_param"] = {**disk, "buffer_count": 8, "buffer_size": largest, "max_in_cpu": 0}
    zero |= {"sub_group_size": 50_000_000, "reduce_bucket_size": largest}
    zero |= {f"stage3_{key}": 0 for key in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")}
    return config


def planned(run: RunConfig, config: EngineConfig, ranks: int) -> tuple[float, float]:
    """Bytes of memory, all of the process, and of disk traffic in a step, without a card."""
    plan = Planner(choose_machine("cpu", gpus=ranks)).plan(run, config.as_planned())
    [memory] = [verdict.needed for verdict in plan.verdicts if verdict.resource == "host memory"]
    return memory, plan.traffic.nvme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="frankenstein_2048")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "p40_zero2.json")
    parser.add_argument("--nvme", type=Path, metavar="DIR", help="instead of --ds_config: ZeRO-Infinity in this folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--quick", action="store_true", help="the mini preset, short rows")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.preset, arguments.seq_len = "mini", 64
    settings = [f"train.micro_batch_size={arguments.rows}", f"data.seq_len={arguments.seq_len}"]
    settings += ["train.gradient_accumulation_steps=1", "data.num_workers=0"]
    run = load_run_config(arguments.preset, [*settings, *arguments.overrides])
    process = discover_process()
    threads = set_threads(process)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.nvme:
            largest = model_facts(build_meta(run.model)).largest
            arguments.ds_config = Path(folder) / "ds_config.json"
            arguments.ds_config.write_text(json.dumps(lean_nvme(arguments.nvme, largest)))
        config, run = load_ds_config(arguments.ds_config, run, process.world_size)
    prepare_ops(config.needs_cpu_adam, print, needs_async_io=bool(nvme_folders(config.config)))
    device = distributed.start(process, on_cpu=bool(CPU_REASON))
    steps, imported = [], psutil.Process().memory_info().rss
    try:
        started = time.perf_counter()
        engine = build_engine(run, config, device, print)
        engine.train()
        built = time.perf_counter() - started
        state = psutil.Process().memory_info().rss - imported
        print(f"{run.preset}: {engine_facts(engine).parameters:,} parameters, engine ready in {built:.0f} s, "
              f"{state / 1e9:.2f} GB of state", flush=True)  # fmt: skip
        expected, traffic = planned(run, config, process.world_size) if CPU_REASON else (0.0, 0.0)
        batch = random_batch(run.model.vocab_size, arguments.rows, arguments.seq_len, device)
        for step in range(arguments.steps):
            started, moved = time.perf_counter(), disk_traffic()
            loss = engine(**batch).loss
            forward = time.perf_counter() - started
            engine.backward(loss)
            backward = time.perf_counter() - started - forward
            engine.step()
            total = time.perf_counter() - started
            moved = disk_traffic() - moved
            steps.append({"loss": loss.item(), "seconds": total, "disk": moved,
                          "applied": bool(engine.was_step_applied())})  # fmt: skip
            print(f"step {step + 1}  loss {loss.item():.4f}  {total:.1f} s (forward {forward:.1f}, backward "
                  f"{backward:.1f}, optimizer {total - forward - backward:.1f})  peak {peak_memory() / 1e9:.2f} GB, "
                  f"disk {moved / 1e9:.1f} GB", flush=True)  # fmt: skip
    finally:
        distributed.stop()
    losses = [step["loss"] for step in steps]
    good = all(map(math.isfinite, losses)) and losses[-1] < losses[0] and all(step["applied"] for step in steps)
    print("finite and falling" if good else "the loss is not finite or does not fall")
    if expected:
        print(f"the plan said {expected / 1e9:.2f} GB, and {traffic / 1e9:.1f} GB over the disk in a step")
    figures = {
        "planned_gb": expected / 1e9,
        "planned_disk_gb": traffic / 1e9,
        "peak_gb": peak_memory() / 1e9,
        "state_gb": state / 1e9,
        "seconds_per_step": min(step["seconds"] for step in steps),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    machine = {
        "processor": processor_name(),
        "threads": threads,
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "full_model", "machine": machine, "rows": steps, "figures": figures}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
