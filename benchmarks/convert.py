"""Time and memory of turning a DeepSpeed checkpoint into plain weights, beside DeepSpeed's own zero_to_fp32.

    python benchmarks/convert.py [--quick] [--sizes] [--layers 12] [--folder DIR]

Makes checkpoints of a model (2048 wide; two ranks, one optimizer step) under ZeRO-2 and ZeRO-3, then converts each with
every program. Memory is the peak resident set of a program or of its verification, whichever is higher, as the system
records it: mapped files included, and some 400 MB of torch, which is why small models have large ratios. Twelve layers
need Linux, 16 GB of memory and 20 GB of disk (`--quick`: 2 and 1). The sizes of each preset's exports are computed from
its shapes (`--sizes` prints these alone). The last line is one JSON object; `rss_over_output` is the worst of the plain
conversions, each with its verification.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from tbf.system import processor_name  # noqa: E402

RANKS = 2
STAGES = (2, 3)
PROGRAMS = {
    "convert_ckpt safetensors": ["--format", "safetensors"],
    "convert_ckpt safetensors --no-verify": ["--format", "safetensors", "--no-verify"],
    "convert_ckpt torch": ["--format", "torch"],
    "convert_ckpt ternary": ["--format", "ternary"],
    "convert_ckpt ternary --no-verify": ["--format", "ternary", "--no-verify"],
}
PLAIN = ("convert_ckpt safetensors", "convert_ckpt torch")
THEIRS = "zero_to_fp32 --safe_serialization"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model 512 wide with one layer")
    parser.add_argument("--sizes", action="store_true", help="only the sizes of each preset's exports, in a second")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="layers (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to work (default: the system's temporary one)"
    )
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "STAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    width, layers = (512, 1) if arguments.quick else (2048, arguments.layers)
    if arguments.make:
        make_checkpoint(Path(arguments.make[0]), int(arguments.make[1]), width, layers)
        return
    sizes = preset_sizes()
    rows = [] if arguments.sizes else measure(arguments.folder)
    figures = {
        f"rss_over_output@{row['program'].replace(' ', '_')}@zero{row['stage']}": row["rss_over_output"] for row in rows
    }
    if rows:
        figures["rss_over_output"] = max(row["rss_over_output"] for row in rows if row["program"] in PLAIN)
    for row in sizes:
        if "bytes_per_weight" in row:
            figures[f"bytes_per_ternary_weight@{row['preset']}"] = row["bytes_per_weight"]
    memory = psutil.virtual_memory().total // 10**9
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "memory_gb": memory}
    print(json.dumps({"benchmark": "convert", "machine": machine, "rows": rows + sizes, "figures": figures}))


def preset_sizes() -> list[dict[str, object]]:
    """Sizes of every preset's exports, without any weights."""
    import torch

    from tbf.config import load_run_config, preset_names
    from tbf.export.plain import shapes_only
    from tbf.export.stored import StoredTensor
    from tbf.export.ternary import packed_slices, packed_tensors, size_report
    from tbf.export.weights import total_bytes

    rows = []
    print(f"{'preset':25} {'parameters':>14} {'FP32 MB':>9} {'ternary MB':>11} {'bytes/ternary weight':>21}")
    for preset in preset_names():
        model = shapes_only(load_run_config(preset).model)
        state = model.state_dict().items()
        tensors = {name: StoredTensor(value.shape, value.dtype, torch.Tensor) for name, value in state}
        slices = packed_slices(model)
        row = {"preset": preset, "parameters": model.num_parameters(), "fp32_mb": round(total_bytes(tensors) / 1e6, 1)}
        if slices:
            report = size_report(tensors, slices)
            row["ternary_mb"] = round(total_bytes(packed_tensors(tensors, slices)) / 1e6, 1)
            row["bytes_per_weight"] = report["bytes_per_weight"]
        packed = f"{row['ternary_mb']:11,.1f} {row['bytes_per_weight']:21.4f}" if slices else f"{'-':>11} {'-':>21}"
        print(f"{preset:25} {row['parameters']:14,} {row['fp32_mb']:9,.1f} {packed}")
        rows.append(row)
    return rows


def measure(parent: Path | None) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=parent, prefix="tbf-convert-") as folder:
        for stage in STAGES:
            rows += compare(Path(folder) / f"zero{stage}", stage)
            shutil.rmtree(Path(folder) / f"zero{stage}")
    return rows


def compare(folder: Path, stage: int) -> Iterator[dict[str, object]]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = [argument for argument in sys.argv[1:] if argument != "--make"]
    made = subprocess.run(
        [*launch, __file__, *options, "--make", str(folder), str(stage)], env=env, capture_output=True, text=True
    )
    if made.returncode:
        raise SystemExit(f"making a checkpoint failed:\n{made.stderr[-2000:]}")
    checkpoint = [str(folder / "tag"), "OUT", "--config", str(folder / "config.json")]
    commands = {name: ["tools/convert_ckpt.py", *checkpoint, *flags] for name, flags in PROGRAMS.items()}
    commands[THEIRS] = [str(folder / "zero_to_fp32.py"), str(folder), "OUT", "--safe_serialization"]
    print(f"\nZeRO-{stage}, {RANKS} ranks" + " " * 30 + f"{'seconds':>9} {'output MB':>10} {'peak MB':>9} {'ratio':>7}")
    for number, (name, command) in enumerate(commands.items()):
        out = folder / f"out{number}"
        seconds, peak = run_watched([sys.executable, *(str(out) if word == "OUT" else word for word in command)], env)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        row = {
            "stage": stage,
            "program": name,
            "seconds": round(seconds, 2),
            "output_mb": round(size / 1e6, 1),
            "peak_mb": round(peak / 1e6, 1),
            "rss_over_output": round(peak / size, 3),
        }
        print(f"{name:45} {seconds:9.1f} {size / 1e6:10,.0f} {peak / 1e6:9,.0f} {peak / size:7.2f}", flush=True)
        yield row


def run_watched(command: list[str], env: dict[str, str]) -> tuple[float, int]:
    """Runs a program to its end: (seconds, peak resident bytes of the largest of it and its children)."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)
        while process.poll() is None:
            peak = max(peak, peaks_now(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-2000:].decode(errors='replace')}")
    return seconds, peak


def peaks_now(pid: int) -> int:
    """The highest peak resident set, in bytes, among a process and its children so far."""
    try:
        top = psutil.Process(pid)
        processes = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return max(peak_of(process.pid) for process in processes)


def peak_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (OSError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def make_checkpoint(folder: Path, stage: int, width: int, layers: int) -> None:
    """Run by every rank."""
    import deepspeed
    import torch

    from tbf.model.config import UltraConfig
    from tbf.model.encoder import TormentedBertFrankenstein

    torch.manual_seed(0)
    config = UltraConfig(hidden_size=width, num_layers=layers, num_loops=1, titan_memory="none")
    model = TormentedBertFrankenstein(config)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), 1e-4), config=settings
    )
    ids = torch.randint(5, config.vocab_size, (1, 16))
    engine.backward(engine(input_ids=ids, masked_positions=ids[:, :4] % 16, masked_labels=ids[:, :4]).loss)
    engine.step()
    engine.save_checkpoint(str(folder), tag="tag", save_latest=True)
    if engine.global_rank == 0:
        config.save(folder / "config.json")


if __name__ == "__main__":
    main()
