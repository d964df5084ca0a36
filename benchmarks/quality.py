"""Is the hybrid ternary encoder any better? Trains `mini` and `bert_control` alike and compares what they learnt.

    nice python benchmarks/quality.py --corpus "corpus/train-*.parquet" --held-out corpus/validation-00000.parquet \\
        --tasks eval_es --work quality --tokens 2e6

Both get the same tokenizer, rows, masks and number of tokens, through launch/train.py on one process. The slower one is
then trained again, from before its decay phase, for only as long as the faster one needed. Every model is scored on
held-out text (`tbf eval`) and fine-tuned on the tasks (`tbf finetune`).

All of it can be stopped and started again: runs continue from their checkpoints, finished parts are kept, and a larger
`--tokens` starts from the newest checkpoint that no decay has touched. `--only rates` needs the machine for itself.
Options of `tbf eval` and `tbf finetune` that start with a dash are given as `--eval=...` and `--finetune=...`.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.config import load_run_config  # noqa: E402
from tbf.system import processor_name  # noqa: E402
from tbf.train.callbacks.csv import read_rows  # noqa: E402
from tbf.train.schedule import decay_start  # noqa: E402

MODELS = ("mini", "bert_control")
STAGES = ("prepare", "rates", "train", "evaluate", "table")
DS_CONFIG = ROOT / "ds_configs" / "p40_zero2.json"
SAVES = 10
"""Checkpoints of a run; all of them are kept, so that a longer run can start where no decay has been."""


class Quality:
    """One folder with everything that a comparison makes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.asked = arguments
        self.work: Path = arguments.work.resolve()
        self.shards, self.rates_file = self.work / "shards", self.work / "rates.json"
        self.tokens_per_step = arguments.rows * arguments.seq_len
        self.steps = SAVES * max(1, round(arguments.tokens / self.tokens_per_step / SAVES))
        for name in ("runs", "logs", "results"):
            (self.work / name).mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """The tokenizer and the shards that all runs share."""
        if not (self.shards / "index.json").exists():
            size = ["--vocab-size", str(self.asked.vocab_size), "--processes", "2", "--runs", str(self.work / "runs")]
            call([*TBF, "data", "prepare", self.asked.corpus, "--out", str(self.shards), *size])

    def rates(self) -> None:
        """Tokens per second of each model in the real trainer, taking turns."""
        if self.rates_file.exists():
            return
        found: dict[str, list[float]] = {model: [] for model in MODELS}
        for number in range(self.asked.rounds):
            for model in MODELS:
                with tempfile.TemporaryDirectory(dir=self.work) as folder:
                    run = Path(folder) / model
                    changes = [
                        "export_at_end=false",
                        "log_every=1",
                        "eval_rows=1",
                        "eval_every=1000",
                        "save_every=1000",
                    ]
                    changes = [f"train.{change}" for change in changes]
                    self._train(model, self.asked.rate_steps, run, changes, log=f"rates-{model}-{number}")
                    warm = self.asked.rate_steps // 4
                    rows = [row for row in read_rows(run / "metrics.csv") if int(row["step"]) > warm]
                    found[model].append(median(float(row["tokens_per_s"]) for row in rows))
        self.rates_file.write_text(json.dumps({model: median(values) for model, values in found.items()}) + "\n")
        print(f"tokens/s: {found}", flush=True)

    def plan(self) -> list[tuple[str, int]]:
        """(model, steps) of the runs: equal tokens first, then the slower model for the time of the faster one."""
        runs = [(model, self.steps) for model in MODELS]
        if self.rates_file.exists():
            rates = json.loads(self.rates_file.read_text())
            fast, slow = sorted(MODELS, key=lambda model: -rates[model])
            shorter = SAVES * round(self.steps * rates[slow] / rates[fast] / SAVES)
            if 0 < shorter < self.steps:
                runs.append((slow, shorter))
        return runs

    def train(self) -> None:
        while todo := [(model, steps) for model, steps in self.plan() if not self._export(model, steps).exists()]:
            model, steps = todo[0]  # planned anew after each: the rates may have come in
            run = self.work / "runs" / f"{model}-{steps}"
            resume = [] if (run / "config.yaml").exists() else self._stem(model, steps)
            self._train(model, steps, run, resume=resume, log=run.name)

    def evaluate(self) -> None:
        for model, steps in self.plan():
            name = f"{model}-{steps}"
            export, results = self._export(model, steps).parent, self.work / "results" / name
            if not export.exists():
                print(f"{name} is not trained yet", flush=True)
                continue
            results.mkdir(exist_ok=True)
            if not (results / "eval.json").exists():
                options = ["--out", str(results / "eval.json"), *self.asked.eval.split()]
                call([*TBF, "eval", str(export), self.asked.held_out, *options])
            suffix = "-frozen" if "--frozen" in self.asked.finetune.split() else ""
            for task in sorted(path.parent for path in Path(self.asked.tasks).glob("*/train.parquet")):
                out = results / f"{task.name}{suffix}.json"
                if not out.exists():
                    call([*TBF, "finetune", str(export), str(task), "--out", str(out), *self.asked.finetune.split()])

    def table(self) -> None:
        """Prints what has been measured so far."""
        rates = json.loads(self.rates_file.read_text()) if self.rates_file.exists() else {}
        rows = [self._row(model, steps, rates) for model, steps in self.plan()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        print(f"\n| | {' | '.join(row['run'] for row in rows)} |\n|---|{'---|' * len(rows)}")
        for name in names[1:]:
            print(f"| {name} | {' | '.join(shown(row.get(name)) for row in rows)} |")
        machine = {"processor": processor_name(), "cores": os.cpu_count()}
        print(json.dumps({"benchmark": "quality", "machine": machine, "rows": rows, "figures": rates}))

    def _row(self, model: str, steps: int, rates: dict[str, float]) -> dict[str, Any]:
        name = f"{model}-{steps}"
        export, results = self._export(model, steps), self.work / "results" / name
        row: dict[str, Any] = {"run": name, "tokens": steps * self.tokens_per_step}
        if export.exists():
            row["parameters"] = json.loads(export.read_text())["parameters"]
        if model in rates:
            row["tokens/s, alone"] = rates[model]
            row["minutes, alone"] = row["tokens"] / rates[model] / 60
        if (results / "eval.json").exists():
            found = json.loads((results / "eval.json").read_text())
            scored = [key for key in ("loss", "masked_accuracy", "pseudo_perplexity") if key in found]
            row |= {f"held-out {key.replace('_', ' ')}": found[key] for key in scored}
        for path in sorted(results.glob("*.json")):
            if path.stem != "eval":
                found = json.loads(path.read_text())
                what = f"{found['task']}, {found['metric']}{', head alone' if found['frozen'] else ''}"
                row[what] = (found["test"]["mean"], found["test"]["spread"])
        return row

    def _export(self, model: str, steps: int) -> Path:
        """What a finished run leaves last."""
        return self.work / "runs" / f"{model}-{steps}" / "export" / "export.json"

    def _train(
        self, model: str, steps: int, run: Path, changes: Sequence[str] = (), resume: Sequence[str] = (), *, log: str
    ) -> None:
        every = max(1, steps // SAVES)
        changes = [
            f"data.seq_len={self.asked.seq_len}", f"train.micro_batch_size={self.asked.rows}",
            f"train.learning_rate={self.asked.learning_rate}", f"train.warmup_steps={self.asked.warmup_steps}",
            f"train.save_every={every}", f"train.eval_every={every}", "train.eval_rows=128",
            f"train.keep_last={2 * SAVES}", "train.tensorboard=false", "train.stall_timeout_s=0", *changes,
        ]  # fmt: skip
        program = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds_config", str(DS_CONFIG)]
        given = ["--preset", model, "--data", str(self.shards), "--run-dir", str(run), "--max-steps", str(steps)]
        overrides = [word for change in changes for word in ("--set", change)]
        call([*program, *given, *overrides, *resume], self.work / "logs" / f"{log}.log")

    def _stem(self, model: str, steps: int) -> list[str]:
        """--resume of the newest checkpoint of a shorter run that lies before both decay phases, if there is one."""
        found: dict[int, Path] = {}
        for run in (self.work / "runs").glob(f"{model}-*"):
            length = int(run.name.rpartition("-")[2])
            limit = decay_start(load_run_config(model, [f"train.max_steps={min(length, steps)}"]).train)
            for path in run.glob("checkpoints/step-*"):
                at = int(path.name.rpartition("-")[2])
                if at <= limit and (path / "manifest.json").exists():
                    found[at] = path
        return ["--resume", str(found[max(found)])] if found else []


TBF = [sys.executable, "-m", "tbf.cli"]


def call(command: list[str], log: Path | None = None) -> None:
    """Runs a program of this repository; its output goes to `log`, or is shown."""
    print("+ " + " ".join(command), flush=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if log is None:
        subprocess.run(command, env=env, check=True)
        return
    with log.open("ab") as output:
        subprocess.run(command, env=env, check=True, stdout=output, stderr=subprocess.STDOUT)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple | list):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", required=True, metavar="SOURCE", help="text to train on")
    add("--held-out", required=True, metavar="SOURCE", help="text that none of it is in")
    add("--tasks", required=True, metavar="DIR", help="folder of task folders")
    add("--work", type=Path, default=Path("quality"), metavar="DIR", help="default: %(default)s")
    add("--tokens", type=float, default=2e6, metavar="N", help="of each model (default: %(default)g)")
    add("--vocab-size", type=int, default=8192, metavar="N")
    add("--seq-len", type=int, default=128, metavar="T")
    add("--rows", type=int, default=8, metavar="N", help="of a batch (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, metavar="X")
    add("--warmup-steps", type=int, default=100, metavar="N")
    add("--rate-steps", type=int, default=40, metavar="N", help="steps of a round of the rates (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="of the rates (default: %(default)s)")
    add("--eval", default="", metavar="'...'", help="options of tbf eval")
    add(
        "--finetune",
        default="--seeds 3",
        metavar="'...'",
        help="options of tbf finetune (default: %(default)s); results with and without --frozen stand side by side",
    )
    add("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    arguments = parser.parse_args()
    quality = Quality(arguments)
    for stage in STAGES:
        if stage in arguments.only:
            getattr(quality, stage)()


if __name__ == "__main__":
    main()
