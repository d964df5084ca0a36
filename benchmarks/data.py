"""Preparation, reading and packing of data beside what Hugging Face's `datasets` and `transformers` do.

    python benchmarks/data.py [--quick] [--corpus FOLDER_OF_PARQUET] [--processes 2]

What is compared is run alternately in one go. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import psutil  # noqa: E402

from tbf.data.files import read_json, write_json  # noqa: E402
from tbf.data.loader import BatchLoader, PackedDataset  # noqa: E402
from tbf.data.masking import MaskSpec  # noqa: E402
from tbf.data.sharding import PrepareOptions, prepare  # noqa: E402
from tbf.data.sources import find_files, open_source  # noqa: E402
from tbf.data.tokenizer import SpanishSPMTokenizer  # noqa: E402
from tbf.errors import run_program  # noqa: E402

SEQ_LEN = 512
BATCH = 32


@contextlib.contextmanager
def peak_child_rss() -> Iterator[list[float]]:
    """Largest resident memory, in MB, of any single child process while the block runs."""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    peak[0] = max(peak[0], child.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended: unlike the clock, blind to other load."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def prepare_with_datasets(dataset: Any, tokenizer: SpanishSPMTokenizer, folder: Path, processes: int) -> Any:
    """`datasets.map(batched, num_proc)` with the same SentencePiece model, over text already converted to Arrow."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2, *ids, 3] for ids in sp.encode(batch["text"], num_threads=1)]}

    return dataset.map(
        encode,
        batched=True,
        num_proc=processes,
        remove_columns=dataset.column_names,
        cache_file_name=str(folder / "tokens.arrow"),
        load_from_cache_file=False,
    )


def measure_preparation(files: list[Path], tokenizer: SpanishSPMTokenizer, work: Path, processes: int, repeats: int):
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    dataset = datasets.load_dataset(
        "parquet", data_files=[str(f) for f in files], split="train", cache_dir=str(work / "hf")
    ).select_columns(["text"])
    converting = time.perf_counter() - started
    seconds: dict[str, list[float]] = {"tbf": [], "datasets": []}
    cpu: dict[str, list[float]] = {"tbf": [], "datasets": []}
    rss = {"tbf": 0.0, "datasets": 0.0}
    tokens = 0
    source = work / "in"
    source.mkdir()
    for file in files:
        (source / file.name).symlink_to(file)
    for _ in range(repeats):
        shutil.rmtree(work / "shards", ignore_errors=True)
        with peak_child_rss() as peak:
            started, used = time.perf_counter(), cpu_seconds()
            result = prepare(
                str(source), tokenizer, work / "shards", PrepareOptions(processes=processes, progress=False)
            )
            seconds["tbf"].append(time.perf_counter() - started)
            cpu["tbf"].append(cpu_seconds() - used)
        rss["tbf"] = max(rss["tbf"], peak[0])
        tokens = result.tokens
        shutil.rmtree(work / "map", ignore_errors=True)
        (work / "map").mkdir()
        with peak_child_rss() as peak:
            started, used = time.perf_counter(), cpu_seconds()
            prepare_with_datasets(dataset, tokenizer, work / "map", processes)
            seconds["datasets"].append(time.perf_counter() - started)
            cpu["datasets"].append(cpu_seconds() - used)
        rss["datasets"] = max(rss["datasets"], peak[0])
    return seconds, cpu, rss, converting, result, tokens


def hf_tokenizer(vocab_size: int) -> Any:
    """A tokenizer object with our special ids, only for the collator to ask."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, vocab_size))]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def measure_reading(dataset: PackedDataset, tokenizer: SpanishSPMTokenizer, rows: int, repeats: int):
    import datasets
    import transformers

    order = np.random.default_rng(0).permutation(dataset.rows_per_epoch)[: max(rows, BATCH)]
    input_ids, _ = dataset.read(order)
    special = (input_ids < 5).astype(np.int8)
    rows_on_disk = datasets.Dataset.from_dict({"input_ids": list(input_ids), "special_tokens_mask": list(special)})
    collator = transformers.DataCollatorForLanguageModeling(hf_tokenizer(tokenizer.vocab_size), mlm_probability=0.3)
    spec = MaskSpec.for_tokenizer(tokenizer, 0.3)
    picks = np.random.default_rng(1).permutation(len(order)).reshape(-1, BATCH).tolist()

    def ours() -> None:
        iterator = iter(BatchLoader(dataset, spec, micro_batch=BATCH))
        for _ in picks:
            next(iterator)
        iterator.close()

    def theirs(kind: str | None) -> None:
        source = rows_on_disk.with_format(kind)
        for pick in picks:
            collator([source[i] for i in pick])

    readers = {"tbf": ours, "HF collator": lambda: theirs(None), "HF collator, numpy": lambda: theirs("numpy")}
    speed: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, read in readers.items():
            started = time.perf_counter()
            read()
            speed[name].append(len(picks) * BATCH / (time.perf_counter() - started))
    return {name: max(values) for name, values in speed.items()}


def measure_seek(folder: Path, tokenizer: SpanishSPMTokenizer) -> float:
    """Milliseconds from a cursor at 90 % of the first epoch to the first batch."""
    dataset = PackedDataset(folder, seq_len=SEQ_LEN)
    spec = MaskSpec.for_tokenizer(tokenizer, 0.3)
    started = time.perf_counter()
    next(iter(BatchLoader(dataset, spec, micro_batch=8, cursor=int(0.9 * dataset.rows_per_epoch))))
    return 1000 * (time.perf_counter() - started)


def grow(folder: Path, out: Path, times: int) -> Path:
    """The same shards `times` over, as hard links under new numbers: a larger corpus for the reader."""
    out.mkdir()
    index = read_json(folder / "index.json", "")
    shards = []
    for turn in range(times):
        for number, shard in enumerate(index["shards"]):
            name = f"shard-{turn * len(index['shards']) + number:05d}"
            for suffix in shard["sha256"]:
                os.link(folder / f"{shard['name']}.{suffix}", out / f"{name}.{suffix}")
            shards.append({**shard, "name": name})
    write_json(out / "index.json", {**index, "shards": shards})
    return out


READ_AND_WEIGH = """
import sys, psutil
from tbf.data.loader import BatchLoader, PackedDataset
from tbf.data.masking import MaskSpec
dataset = PackedDataset(sys.argv[1], seq_len=int(sys.argv[2]))
steps = iter(BatchLoader(dataset, MaskSpec(0.3, dataset.index.vocab_size), micro_batch=32))
peak = 0
for _ in range(int(sys.argv[3]) // 32):
    next(steps)
    peak = max(peak, psutil.Process().memory_info().rss)
print(dataset.rows_per_epoch, peak)
"""


def measure_memory(folders: list[Path], rows: int) -> list[tuple[int, float]]:
    """(rows an epoch, peak RSS in MB) of a fresh process that reads `rows` rows, per folder."""
    found = []
    for folder in folders:
        PackedDataset(folder, seq_len=SEQ_LEN)  # rows are packed here, so that the child only reads
        command = [sys.executable, "-c", READ_AND_WEIGH, str(folder), str(SEQ_LEN), str(rows)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        count, rss = done.stdout.split()
        found.append((int(count), int(rss) / 1e6))
    return found


def measure_data_wait(shards: Path, run_dir: Path, steps: int) -> float:
    """Share of a step's time that a run of `mini` waits for its batch, without the first step, which starts workers."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--preset", "mini", "--data", str(shards)]
    command += ["--ds_config", str(ROOT / "ds_configs" / "p40_zero2.json"), "--run-dir", str(run_dir)]
    changes = {"max_steps": steps, "eval_every": steps, "eval_rows": 8, "save_every": steps, "log_every": 1}
    for key, value in {**changes, "export_at_end": "false", "tensorboard": "false"}.items():
        command += ["--set", f"train.{key}={value}"]
    subprocess.run(
        command,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        shares = [float(row["data_wait"]) for row in csv.DictReader(file) if row["data_wait"]]
    return mean(shares[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of the corpus, one repetition")
    default = Path(os.environ.get("TBF_TEST_DATA", ROOT.parent / "shared")) / "corpus_es"
    parser.add_argument("--corpus", type=Path, default=default, help="folder of parquet files (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="folder or .model file; default: one of 16,000 ids is trained")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    files = find_files(str(arguments.corpus))
    if arguments.quick:
        files = sorted(files, key=lambda file: file.stat().st_size)[:2]
    repeats, rows = (1, 2048) if arguments.quick else (3, 16384)
    work = Path(tempfile.mkdtemp(prefix="tbf-bench-data-"))
    try:
        if arguments.tokenizer:
            tokenizer = SpanishSPMTokenizer.from_pretrained(arguments.tokenizer)
        else:
            tokenizer = SpanishSPMTokenizer.train(open_source(str(files[0])), 16_000)
        text = sum(len(t.encode()) for file in files for t in open_source(str(file))) / 1e6
        seconds, cpu, rss, converting, result, tokens = measure_preparation(
            files, tokenizer, work, arguments.processes, repeats
        )
        dataset = PackedDataset(work / "shards", seq_len=SEQ_LEN)
        speed = measure_reading(dataset, tokenizer, min(rows, dataset.rows_per_epoch // BATCH * BATCH), repeats)
        seek = measure_seek(work / "shards", tokenizer)
        waiting = measure_data_wait(work / "shards", work / "run", 5 if arguments.quick else 30)
        memory = measure_memory([work / "shards", grow(work / "shards", work / "ten", 10)], rows)
    finally:
        shutil.rmtree(work, ignore_errors=True)

    ratio = median(b / a for a, b in zip(seconds["tbf"], seconds["datasets"]))
    cpu_ratio = median(b / a for a, b in zip(cpu["tbf"], cpu["datasets"]))
    best_hf = max(value for name, value in speed.items() if name != "tbf")
    figures = {
        "prepare_vs_datasets": round(ratio, 2),
        "prepare_vs_datasets_cpu_time": round(cpu_ratio, 2),
        "reader_vs_hf_collator": round(speed["tbf"] / best_hf, 2),
        "packing_efficiency": round(dataset.packing_efficiency, 4),
        "prepare_peak_rss_mb_per_worker": round(rss["tbf"]),
        "seek_ms": round(seek, 1),
        "data_wait_share": round(waiting, 5),
        "loader_rss_mb_1x": round(memory[0][1]),
        "loader_rss_mb_10x": round(memory[1][1]),
    }
    print(f"\ncorpus: {text:.0f} MB of text, {result.documents:,} documents, {tokens / 1e6:.1f} M tokens "
          f"({tokenizer.vocab_size:,} ids); {arguments.processes} processes, {repeats} repetition(s)")  # fmt: skip
    print(f"\n{'prepare':<22}{'seconds':>10}{'CPU s':>8}{'MB/s':>8}{'MB RSS/worker':>16}")
    table = []
    for name, values in seconds.items():
        line = {
            "what": f"prepare, {name}",
            "seconds": round(median(values), 2),
            "cpu_seconds": round(median(cpu[name]), 2),
            "mb_per_s": round(text / median(values), 1),
        }
        table.append(line)
        numbers = f"{line['seconds']:>10}{line['cpu_seconds']:>8}{line['mb_per_s']:>8}"
        print(f"{name:<22}{numbers}{rss[name]:>16.0f}")
    print(f"({converting:.1f} s in which datasets converts parquet to Arrow are not counted; tbf reads parquet, cleans,"
          " removes duplicates and hashes in its time)")  # fmt: skip
    print(f"\n{'read rows and mask':<22}{'rows/s':>10}")
    for name, value in speed.items():
        table.append({"what": f"read, {name}", "rows_per_s": round(value)})
        print(f"{name:<22}{value:>10,.0f}")
    print(f"\npacking at {SEQ_LEN}: {dataset.packing_efficiency:.2%}; seek to 90 % of an epoch: {seek:.1f} ms")
    print(f"training mini waits for data {waiting:.3%} of the time")
    for count, value in memory:
        print(f"loader over {count:,} rows an epoch: peak RSS {value:.0f} MB")
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "data", "machine": machine, "rows": table, "figures": figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
