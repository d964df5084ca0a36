"""What a rank sends in an optimizer step, and what buckets and overlap make of a slow cable: docs/scaling.md.

    python benchmarks/communication.py [bytes|buckets] [--quick]

Two virtual machines (tests/multinode, as root) take steps of the `mini` model through the real engine. `bytes` compares
the counter of each one's network card with the planner's formula, by ZeRO stage and accumulation; packet headers are in
the count. `buckets` times steps over cables, by bucket size, with `overlap_comm` and without. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RANKS, WARM_UP = 2, 2
CONFIGS = {1: "p40_zero1.json", 2: "p40_zero2.json", 3: "p40_zero3.json"}
CABLES = {"300 Mbit/s": (0.0, 300e6), "100 Mbit/s, 20 ms": (0.02, 100e6)}
BUCKETS = (1_000_000, 4_000_000, 100_000_000)


@dataclass(frozen=True)
class Case:
    """An engine, and how many steps of it to measure. `bucket`, `overlap`, `live`: None leaves the file's value."""

    stage: int
    accumulation: int = 1
    steps: int = 4
    bucket: int | None = None
    overlap: bool | None = None
    live: int | None = None
    """stage3_max_live_parameters: below the model's size, each loop gathers its layers anew."""

    @property
    def name(self) -> str:
        return f"zero{self.stage}{'' if self.live is None else ' regathering'} x{self.accumulation}"

    def ds_config(self) -> dict[str, Any]:
        config = json.loads((ROOT / "ds_configs" / CONFIGS[self.stage]).read_text())
        zero = config["zero_optimization"]
        changes = {
            "reduce_bucket_size": self.bucket,
            "overlap_comm": self.overlap,
            "stage3_max_live_parameters": self.live,
            "stage3_max_reuse_distance": self.live,
        }
        zero.update({key: value for key, value in changes.items() if value is not None})
        return config


BYTES = [Case(stage, accumulation) for stage in (1, 2, 3) for accumulation in (1, 4)]
BYTES += [Case(3, accumulation, live=1_000_000) for accumulation in (1, 4)]


def resolve(case: Case, ds_config: Path) -> tuple[Any, Any]:
    from tbf.config import load_run_config
    from tbf.train.ds_config import load_ds_config

    small = {
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": case.accumulation,
        "data.seq_len": 64,
        "model.vocab_size": 4000,
    }
    run = load_run_config("mini", [f"{key}={value}" for key, value in small.items()])
    config, run = load_ds_config(ds_config, run, RANKS)
    return run, config


def planned(case: Case, ds_config: Path) -> int:
    """Bytes that the planner expects a rank to send in a step."""
    from tbf.model.flops import build_meta
    from tbf.planning.engine_state import model_facts
    from tbf.planning.traffic import step_traffic

    run, config = resolve(case, ds_config)
    engine = config.as_planned()
    facts = model_facts(build_meta(run.model), engine.persistence)
    return step_traffic(facts, engine, RANKS, run.model.num_loops, 0, on_cuda=False).network


def worker(case: Case, ds_config: Path) -> None:
    """One rank: takes the steps and prints its bytes and seconds of one."""
    from tbf.train.environment import choose_accelerator, discover_process, set_threads

    choose_accelerator()
    process = discover_process()
    threads = set_threads(process)
    import torch
    import torch.distributed as dist

    from tbf.train import distributed
    from tbf.train.build_ops import prepare_ops
    from tbf.train.rehearsal import largest_batch
    from tbf.train.run import build_engine

    torch.set_num_threads(threads)
    run, config = resolve(case, ds_config)
    prepare_ops(config.needs_cpu_adam, lambda text: None)
    device = distributed.start(process, on_cpu=True)
    engine = build_engine(run, config, device, lambda text: None)
    engine.train()
    batch, seconds, before = largest_batch(run), [], 0
    for step in range(WARM_UP + case.steps):
        dist.barrier()
        if step == WARM_UP:
            before = sent_bytes()
        started = time.perf_counter()
        for _ in range(case.accumulation):
            engine.backward(engine(**batch).loss)
            engine.step()
        seconds.append(time.perf_counter() - started)
    dist.barrier()
    found = {"sent": (sent_bytes() - before) / case.steps, "seconds": median(seconds[WARM_UP:])}
    print("FOUND " + json.dumps(found), flush=True)
    distributed.stop()


def sent_bytes() -> int:
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0:" in line)
    return int(line.split(":")[1].split()[8])


def measure(lab: Any, case: Case) -> dict[str, float]:
    """Runs a case on the lab's machines; of what the ranks found, the most."""
    started = []
    for rank, host in enumerate(lab.hosts):
        (lab.files(host) / "ds_config.json").write_text(json.dumps(case.ds_config()))
        env = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29500}
        line = [sys.executable, Path(__file__).resolve(), "--worker", json.dumps(asdict(case))]
        env["MASTER_ADDR"] = lab.hosts[0]
        started.append(lab.start(host, line, **{name: str(value) for name, value in env.items()}))
    output = [process.communicate(timeout=300)[0] for process in started]
    found = [json.loads(line[6:]) for text in output for line in text.splitlines() if line.startswith("FOUND ")]
    if len(found) != RANKS:
        raise SystemExit("\n".join(text[-3000:] for text in output))
    return {key: max(rank[key] for rank in found) for key in found[0]}


def compare_bytes(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    from tests.multinode.lab import Lab

    print("\n| ZeRO | micro-batches | a rank sends in a step | planned | measured / planned |\n|---|---|---|---|---|")
    rows = []
    with Lab(folder / "bytes") as lab:
        for case in cases:
            sent = measure(lab, case)["sent"]
            expected = planned(case, lab.files(lab.hosts[0]) / "ds_config.json")
            rows.append({"case": case.name, "sent": sent, "planned": expected, "ratio": sent / expected})
            stage = f"{case.stage}{'' if case.live is None else ', each loop gathers anew'}"
            print(f"| {stage} | {case.accumulation} | {sent / 1e6:.1f} MB | {expected / 1e6:.1f} MB "
                  f"| {sent / expected:.3f} |", flush=True)  # fmt: skip
    return rows


def compare_buckets(cables: dict[str, tuple[float, float]], folder: Path) -> list[dict[str, Any]]:
    from tests.multinode.lab import Cable, Lab

    print("\n| cable | bucket, elements | without overlap | with overlap |\n|---|---|---|---|")
    rows = []
    for name, (delay, rate) in cables.items():
        with Lab(folder / f"{rate:.0f}", cable=Cable(delay, rate)) as lab:
            for bucket in BUCKETS:
                cases = [Case(1, steps=3, bucket=bucket, overlap=overlap) for overlap in (False, True)]
                seconds = [measure(lab, case)["seconds"] for case in cases]
                rows.append({"cable": name, "bucket": bucket, "seconds": seconds[0], "overlapped": seconds[1]})
                print(f"| {name} | {bucket:,} | {seconds[0]:.2f} s | {seconds[1]:.2f} s |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("bytes", "buckets"), help="default: both")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(Case(**json.loads(arguments.worker)), Path("ds_config.json"))
    from tests.multinode.lab import missing

    if reason := missing():
        sys.exit(f"cannot be measured here: {reason}")
    parts, rows = (arguments.part,) if arguments.part else ("bytes", "buckets"), {}
    with tempfile.TemporaryDirectory(prefix="tbf-lab-") as folder:
        if "bytes" in parts:
            rows["bytes"] = compare_bytes(BYTES[:2] if arguments.quick else BYTES, Path(folder))
        if "buckets" in parts:
            cables = dict(list(CABLES.items())[:1]) if arguments.quick else CABLES
            rows["buckets"] = compare_buckets(cables, Path(folder))
    figures = {f"sent_over_planned@{row['case']}": row["ratio"] for row in rows.get("bytes", [])}
    machine = {"ranks": RANKS, "processors": os.cpu_count()}
    print(json.dumps({"benchmark": "communication", "machine": machine, "rows": rows, "figures": figures}))
    return None


if __name__ == "__main__":
    main()
