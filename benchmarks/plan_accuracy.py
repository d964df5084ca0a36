"""What `tbf plan` predicts beside what a run through the real engine then takes: memory and seconds of a step.

    python benchmarks/plan_accuracy.py [--quick] [--only NAME ...] [--steps 4] [--results FILE]

Each configuration is planned, then run in fresh processes, one a rank, on random rows. Memory is resident memory, read
from the kernel, above what a process held that had trained a tiny model: `state` between two steps, `peak` inside one,
under an allocator that gives freed blocks back at once; with state on NVMe, `disk` is what a rank reads and writes
there in a step. Seconds come from a second run with the allocator as trained, whose own peak is `as run`. With
`--results` rows are kept in a file, and those that it holds are not run again, so a long comparison can be taken in
pieces. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.train.environment import choose_accelerator, discover_process, set_threads, tune_allocator  # noqa: E402

os.environ["DS_ACCELERATOR"] = "cpu"
MB, GB = 1e6, 1e9
THREE = ("frankenstein_2048", "model.num_layers=3", "model.layer_pattern=[retnet, titan_attn, mamba]")
EXPERTS = ("frankenstein_2048_moe", "model.num_layers=1", "model.layer_pattern=[retnet]")
MIXED = ("frankenstein_1024", "model.num_layers=4", "model.layer_pattern=[retnet, titan_attn, mamba, ode]")
HOST = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True)
class Case:
    """A model (a preset and changes to it), a shape of batch, and an engine."""

    model: tuple[str, ...]
    stage: int
    offload: str = "optimizer"
    """`none`, `optimizer`, or `all` with the weights (ZeRO-3); `nvme` is all on a disk."""
    granularity: str = "layer"
    ranks: int = 1
    rows: int = 1
    tokens: int = 512
    accumulation: int = 1

    def ds_config(self, folder: Path) -> dict[str, Any]:
        """`folder`: for what goes to a disk."""
        name = {1: "p40_zero1", 2: "p40_zero2", 3: "p40_zero3"}[self.stage] + "_nvme" * (self.offload == "nvme")
        config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        config["activation_checkpointing"] = {"granularity": self.granularity}
        zero = config["zero_optimization"]
        if self.offload == "nvme":
            zero["sub_group_size"] = 20_000_000  # several groups, as a model that needs the disk has
            for block in ("offload_optimizer", "offload_param"):
                zero[block]["nvme_path"] = str(folder)
            return config
        for block, wanted in (("offload_optimizer", self.offload != "none"), ("offload_param", self.offload == "all")):
            zero.pop(block, None)
            if wanted:
                zero[block] = HOST
        if self.offload == "none":
            config["optimizer"]["params"]["torch_adam"] = True
        return config

    def overrides(self) -> list[str]:
        return [
            *self.model[1:],
            f"train.micro_batch_size={self.rows}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"data.seq_len={self.tokens}",
            "data.num_workers=0",
        ]


CASES = {
    "zero2 offload, layer": Case(THREE, 2),
    "zero2 offload, none": Case(MIXED, 2, granularity="none"),
    "zero2 offload, loop": Case(MIXED, 2, granularity="loop"),
    "zero2 offload, accumulating": Case(MIXED, 2, tokens=256, accumulation=2),
    "zero2, no offload": Case(MIXED, 2, offload="none", tokens=256),
    "zero1 offload, accumulating": Case(MIXED, 1, tokens=256, accumulation=2),
    "zero3 offload": Case(THREE, 3, offload="all"),
    "zero3, no offload, loop": Case(MIXED, 3, offload="none", granularity="loop", tokens=256),
    "zero2 offload, 2 ranks": Case(THREE, 2, ranks=2),
    "zero3 offload, 2 ranks": Case(MIXED, 3, offload="all", ranks=2, tokens=256),
    "zero2 offload, 2048 tokens": Case(MIXED, 2, tokens=2048),
    "zero2 offload, 8 x 128 tokens": Case(MIXED, 2, rows=8, tokens=128),
    "experts, zero2 offload": Case(EXPERTS, 2),
    "experts, zero3 offload, 2 ranks": Case(EXPERTS, 3, offload="all", ranks=2),
    "zero3 on NVMe": Case(THREE, 3, offload="nvme"),
    "experts, zero3 on NVMe": Case(EXPERTS, 3, offload="nvme"),
}
QUICK = {
    "quick, zero2 offload": Case(("mini",), 2, rows=2, tokens=64),
    "quick, zero3 offload, 2 ranks": Case(("mini",), 3, offload="all", ranks=2, rows=2, tokens=64),
}


def planned(case: Case, folder: Path) -> dict[str, float]:
    """Bytes of a rank and seconds of a step, by the planner."""
    from tbf.hardware.cpu_rates import cpu_rates
    from tbf.planning.calibration import pass_factor
    from tbf.planning.machine import choose_machine
    from tbf.planning.plan import PROCESS_BYTES, Planner, memory_by_place

    run, config = resolve(case, folder)
    machine = choose_machine("cpu", gpus=case.ranks)
    rates = cpu_rates(machine.threads * machine.gpus, refresh=True)  # of this hour: other programs may have run then
    pass_factor(rates, refresh=True)
    engine = config.as_planned()
    plan = Planner(machine).plan(run, engine)
    held = (item.bytes for item in plan.items if item.when == "always" and item.place != "nvme")
    state = sum(held) + plan.activations.ternary_caches
    peak = memory_by_place(plan.items, plan.activations, on_cuda=False)["host"]
    as_run = peak + sum(plan.beside.values()) - PROCESS_BYTES  # which is in what is compared with
    parts = {name: seconds for name, seconds in vars(plan.time).items() if seconds}
    return {
        "parameters": plan.facts.total,
        "state": state,
        "peak": peak,
        "as_run": as_run,
        "seconds": plan.time.total,
        "disk": plan.traffic.nvme,
        "parts": parts,
    }


def resolve(case: Case, folder: Path) -> tuple[Any, Any]:
    from tbf.config import load_run_config
    from tbf.train.ds_config import load_ds_config

    run = load_run_config(case.model[0], case.overrides())
    config, run = load_ds_config(folder / "ds_config.json", run, case.ranks)
    return run.replace(model={"vocab_size": run.data.wanted_vocab_size}), config


def measured(name: str, folder: Path, steps: int, purpose: str) -> dict[str, float]:
    """Runs a case's ranks in fresh processes; of what they found, the most."""
    case = (CASES | QUICK)[name]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}", __file__,
            "--child", str(folder), "--only", name, "--steps", str(steps), "--purpose", purpose]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: the run failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    return {key: max(rank[key] for rank in found) for key in found[0]}


def child(name: str, folder: Path, steps: int, purpose: str) -> None:
    """One rank of a run."""
    choose_accelerator()
    process = discover_process()
    threads = set_threads(process)
    libc = ctypes.CDLL(None)
    if purpose == "time":
        tune_allocator()
    else:
        libc.mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD of mallopt(3)
    import torch

    from tbf.model.bitlinear import invalidate_ternary
    from tbf.system import disk_traffic, peak_memory, reset_peak
    from tbf.train import distributed
    from tbf.train.build_ops import prepare_ops
    from tbf.train.rehearsal import largest_batch
    from tbf.train.run import build_engine

    case = (CASES | QUICK)[name]
    run, config = resolve(case, folder)
    torch.set_num_threads(threads)
    prepare_ops(config.needs_cpu_adam, lambda text: None)
    device = distributed.start(process, on_cpu=True)

    def settle() -> int:
        if purpose != "time":  # what a step finds again there costs it no page faults
            gc.collect()
            libc.malloc_trim(0)
        return reset_peak()

    tiny = run.replace(model={"hidden_size": 64, "num_heads": 2, "retention_heads": 2, "mamba_head_dim": 32,
                              "num_layers": 1, "layer_pattern": run.model.layer_pattern[:1], "vocab_size": 64,
                              "ffn_hidden_size": 64}, data={"seq_len": 16})  # fmt: skip
    engine = build_engine(tiny, config, device, lambda text: None)
    for _ in range(case.accumulation):
        engine.backward(engine(**largest_batch(tiny)).loss)
        engine.step()
    engine.destroy()
    del engine
    invalidate_ternary()
    before = settle()
    engine = build_engine(run, config, device, lambda text: None)
    built = peak_memory() - before
    engine.train()
    batch = largest_batch(run)
    seconds, states, passes, updates, disk = [], [], [], [], []
    for _ in range(steps):
        states.append(settle() - before)
        moved = disk_traffic()
        started = time.perf_counter()
        for micro in range(case.accumulation):
            loss = engine(**batch).loss
            engine.backward(loss)
            if micro < case.accumulation - 1:
                engine.step()
        passes.append(peak_memory() - before)
        reset_peak()
        engine.step()
        seconds.append(time.perf_counter() - started)
        updates.append(peak_memory() - before)
        disk.append(disk_traffic() - moved)
    found = {"state": states[-1], "pass": max(passes[1:]), "update": max(updates[1:]), "built": built,
             "seconds": median(seconds[1:]), "disk": median(disk[1:]), "loss": loss.item()}  # fmt: skip
    (folder / f"rank{process.rank}.json").write_text(json.dumps(found))
    distributed.stop()


def compare(name: str, steps: int, what: set[str]) -> dict[str, Any]:
    """A row of the table: planned and measured, and the errors as shares of what was measured."""
    case = (CASES | QUICK)[name]
    with tempfile.TemporaryDirectory(prefix="tbf-plan-") as folder:
        (Path(folder) / "ds_config.json").write_text(json.dumps(case.ds_config(Path(folder))))
        plan = planned(case, Path(folder))
        took = {}
        if "memory" in what:
            memory = measured(name, Path(folder), 3 if plan["disk"] else 2, "memory")  # NVMe settles after two
            took |= {"state": memory["state"], "peak": max(memory["pass"], memory["update"])}
            if plan["disk"]:
                took["disk"] = memory["disk"]
        if "time" in what:
            timed = measured(name, Path(folder), steps, "time")
            took |= {"as_run": max(timed["pass"], timed["update"]), "seconds": timed["seconds"]}
    errors = {key: plan[key] / took[key] - 1 for key in took}
    if "memory" in what:
        errors["activations"] = (plan["peak"] - plan["state"]) / (took["peak"] - took["state"]) - 1
    return {"name": name, "ranks": case.ranks, "planned": plan, "measured": took, "errors": errors}


def show(rows: list[dict[str, Any]]) -> None:
    columns = {"state": ("state, GB", GB), "peak": ("peak, GB", GB), "as_run": ("as run, GB", GB),
               "seconds": ("seconds", 1.0), "disk": ("disk, GB", GB)}  # fmt: skip
    print(f"{'planned, found, error':33}{'M par.':>8}" + "".join(f"{title:>22}" for title, _ in columns.values()))
    for row in rows:
        line = f"{row['name']:33}{row['planned']['parameters'] / 1e6:8.0f}"
        for key, (_, unit) in columns.items():
            if key in row["measured"]:
                values = row["planned"][key] / unit, row["measured"][key] / unit
                line += f"{values[0]:8.2f}{values[1]:7.2f}{row['errors'][key]:+7.1%}"
            else:
                line += 22 * " "
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--results", type=Path, help="a file of rows, read and added to")
    parser.add_argument("--no-time", action="store_true", help="memory alone, which other programs do not disturb")
    parser.add_argument("--no-memory", action="store_true", help="time alone, which is sooner done")
    parser.add_argument("--quick", action="store_true", help="two small configurations")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--purpose", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.only[0], Path(arguments.child), arguments.steps, arguments.purpose)
        return 0
    known = CASES | QUICK
    wanted = arguments.only or list(QUICK if arguments.quick else CASES)
    if set(wanted) - known.keys():
        parser.error(f"no configuration {sorted(set(wanted) - known.keys())}; choose from: {', '.join(known)}")
    what = {"memory", "time"} - {"time" if arguments.no_time else "", "memory" if arguments.no_memory else ""}
    rows: dict[str, Any] = {}
    if arguments.results and arguments.results.exists():
        rows = {row["name"]: row for row in map(json.loads, arguments.results.read_text().splitlines())}
    for name in wanted:
        if name not in rows:
            rows[name] = compare(name, arguments.steps, what)
            show([rows[name]])
            sys.stdout.flush()
            if arguments.results:
                with arguments.results.open("a") as handle:
                    handle.write(json.dumps(rows[name]) + "\n")
    chosen = [rows[name] for name in wanted]
    show(chosen)
    names = {"peak": "memory_worst_error", "state": "state_worst_error", "activations": "activations_worst_error",
             "as_run": "as_run_worst_error", "seconds": "time_worst_error", "disk": "disk_worst_error"}  # fmt: skip
    found = {key: [abs(row["errors"][key]) for row in chosen if key in row["errors"]] for key in names}
    figures = {names[key]: max(errors) for key, errors in found.items() if errors}
    print(json.dumps({"benchmark": "plan_accuracy", "machine": machine(), "rows": chosen, "figures": figures}))
    return 0


def machine() -> dict[str, Any]:
    import torch

    from tbf.system import processor_name

    return {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gb": psutil.virtual_memory().total / GB,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
