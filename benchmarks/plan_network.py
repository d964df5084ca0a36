"""Step time over slow networks: what `tbf plan` predicts beside what a run on two machines then takes.

    python benchmarks/plan_network.py [--quick]

Two virtual machines (tests/multinode, as root) on this one train `mini` through launch/train.py and p40_multinode.json,
one rank each, over cables of several widths. Compute is planned with the rates of this processor under two ranks, since
both machines are this one. Wants a machine on which nothing else runs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DS_CONFIG = ROOT / "ds_configs" / "p40_multinode.json"
CABLES = ((0.0, 50e6), (0.0, 200e6), (0.0, 1000e6), (0.02, 100e6))
"""Seconds of delay each way, bits per second."""
SHAPE = {
    "train.micro_batch_size": 4,
    "train.gradient_accumulation_steps": 2,
    "data.seq_len": 128,
    "data.vocab_size": 2000,
}
STEPS, WARM_UP = 6, 1
HOSTS = 2


def planned(delay: float, rate: float) -> Any:
    """The plan's StepTime."""
    from tbf.config import load_run_config
    from tbf.hardware.cpu_rates import cpu_rates, shared
    from tbf.planning.machine import choose_machine
    from tbf.planning.plan import Planner
    from tbf.train.ds_config import load_ds_config

    run = load_run_config("mini", [f"{key}={value}" for key, value in SHAPE.items()])
    config, run = load_ds_config(DS_CONFIG, run, HOSTS)
    run = run.replace(model={"vocab_size": run.data.wanted_vocab_size})
    machine = choose_machine("cpu", gpus=1, nodes=HOSTS, threads=1, network_gbit=rate / 1e9, latency_ms=delay * 1e3)
    planner = Planner(machine)
    planner.rates = shared(cpu_rates(HOSTS, refresh=True), HOSTS)  # of this hour: other programs may have run before
    engine = config.as_planned()
    return planner.plan(run, engine).time


def measured(delay: float, rate: float, folder: Path) -> float:
    """Seconds of a step of a real run, the median after the first ones."""
    from tests.helpers.runs import metrics
    from tests.multinode import jobs
    from tests.multinode.lab import Cable, Lab

    settings = {**SHAPE, "data.cache_dir": folder / "data", "data.num_workers": 0, "train.log_every": 1,
                "train.export_at_end": "false", "train.tensorboard": "false"}  # fmt: skip
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with Lab(folder / f"{rate:.0f}-{delay}", cable=Cable(delay, rate)) as lab:
        jobs.write_inputs(lab)
        run_dir = lab.work / "run"
        job = jobs.no_ssh(
            lab, jobs.program(run_dir, "mini", "--max-steps", STEPS, *overrides, ds_config=DS_CONFIG)
        )  # fmt: skip
        if set(job.wait(300).values()) != {0}:
            raise SystemExit(job.output[-3000:])
        rows = metrics(lab.files(lab.hosts[0]) / "run", "tokens", "tokens_per_s")
    steps = [(int(float(tokens)), float(speed)) for tokens, speed in rows if speed]
    seconds = [(tokens - before) / speed for (before, _), (tokens, speed) in pairwise(steps)]
    return median(seconds[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one cable")
    arguments = parser.parse_args()
    from tests.multinode.lab import missing

    if reason := missing():
        sys.exit(f"cannot be measured here: {reason}")
    print("| cable | planned | of it network | measured | planned / measured |\n|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory(prefix="tbf-lab-") as folder:
        for delay, rate in CABLES[1:2] if arguments.quick else CABLES:
            took = measured(delay, rate, Path(folder))
            time = planned(delay, rate)
            rows.append({"bits_per_s": rate, "delay_s": delay, "planned_s": time.total, "measured_s": took})
            name = f"{rate / 1e6:.0f} Mbit/s" + (f", {delay * 1e3:.0f} ms" if delay else "")
            print(f"| {name} | {time.total:.2f} s | {time.network:.2f} s | {took:.2f} s "
                  f"| {time.total / took:.2f} |", flush=True)  # fmt: skip
    worst = max(abs(row["planned_s"] / row["measured_s"] - 1) for row in rows)
    print(json.dumps({"benchmark": "plan_network", "machine": {"hosts": HOSTS}, "rows": rows,
                      "figures": {"step_worst_error": worst}}))  # fmt: skip


if __name__ == "__main__":
    main()
