"""What the guard, the watchdog and the callbacks of a run cost, as a share of a step of the Mini preset.

    python benchmarks/guard_cost.py [--quick] [--steps 24]

Trains Mini on the embedded sample through the whole of the trainer, on one rank. In every other step they are left out:
the guard's verdicts and its gate in front of DeepSpeed's norm, and all callbacks (log, metrics, TensorBoard, progress,
status, evaluation and checkpoints, of which none falls into these steps). What they take in the other steps is timed
directly, since a difference of two noisy steps would drown it; the medians of both kinds of step are shown beside it.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.train.environment import choose_accelerator, discover_process, set_threads, tune_allocator  # noqa: E402

PROCESS = discover_process()
THREADS = set_threads(PROCESS)
ALLOCATOR = tune_allocator()
CPU_REASON = choose_accelerator()

import torch  # noqa: E402

from launch.train import parse_arguments  # noqa: E402
from tbf.system import processor_name  # noqa: E402
from tbf.train import run as program  # noqa: E402
from tbf.train.callbacks.base import CallbackList  # noqa: E402
from tbf.train.guard import Guard, NormGate  # noqa: E402
from tbf.train.trainer import Trainer  # noqa: E402
from tbf.train.watchdog import Watchdog  # noqa: E402

WARM_UP = 8  # then the spike window is filled, as in a long run


class Meter:
    """Times chosen methods in `on` steps and leaves them out in the others."""

    def __init__(self) -> None:
        self.on, self.spent = True, 0.0
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.costs: list[float] = []

    def time(self, owner: type, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return None
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - started

        setattr(owner, name, timed)

    def install(self) -> None:
        for owner, name in [(Guard, "before_update"), (CallbackList, "on_step"), (Watchdog, "here")]:
            self.time(owner, name)
        self._time_after_update()
        self._time_gate()
        step = Trainer.train_step

        def whole(trainer: Trainer, steps: Any) -> Any:
            if trainer.step == WARM_UP:
                for rule in (trainer.guard._losses, trainer.guard._log_norms):
                    rule.recent.extend(10.0 + 0.001 * i for i in range(rule.recent.maxlen))
            self._close(trainer.step)
            self.on, self.spent = trainer.step % 2 == 0 or trainer.step < WARM_UP, 0.0
            self.started = time.perf_counter()
            return step(trainer, steps)

        Trainer.train_step = whole

    def _close(self, step: int) -> None:
        """Ends the step before, callbacks included."""
        if step > WARM_UP:
            self.steps[self.on].append(time.perf_counter() - self.started)
            if self.on:
                self.costs.append(self.spent)

    def _time_after_update(self) -> None:
        self.time(Guard, "after_update")
        timed = Guard.after_update
        Guard.after_update = lambda guard, *args: timed(guard, *args) if self.on else float(guard._gate.norm)

    def _time_gate(self) -> None:
        """The wrapper's own part: what it takes beyond the norm that DeepSpeed computes in any case."""
        wrap = NormGate._gated

        def gated(gate: NormGate, norms: Any) -> Any:
            inner = 0.0

            def timed_norms(*args: Any, **kwargs: Any) -> Any:
                nonlocal inner
                started = time.perf_counter()
                found = norms(*args, **kwargs)
                inner = time.perf_counter() - started
                return found

            wrapped = wrap(gate, timed_norms)

            def call(*args: Any, **kwargs: Any) -> Any:
                if not self.on:
                    gate.norm = norms(*args, **kwargs)
                    return gate.norm
                started = time.perf_counter()
                found = wrapped(*args, **kwargs)
                self.spent += time.perf_counter() - started - inner
                return found

            return call

        NormGate._gated = gated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="measured steps, half of them without")
    parser.add_argument("--quick", action="store_true", help="six steps")
    arguments = parser.parse_args()
    steps = WARM_UP + 1 + (6 if arguments.quick else arguments.steps)
    meter = Meter()
    meter.install()
    with tempfile.TemporaryDirectory(prefix="tbf-guard-") as folder:
        overrides = ["train.export_at_end=false", "train.rehearse=false", "train.log_every=1",
                     f"train.save_every={10 * steps}",
                     f"train.eval_every={10 * steps}"]  # fmt: skip
        line = ["--ds_config", ROOT / "ds_configs" / "p40_zero2.json", "--max-steps", steps]
        line += ["--run-dir", Path(folder) / "run", *(word for override in overrides for word in ("--set", override))]
        sys.argv = [str(ROOT / "launch" / "train.py"), *map(str, line)]
        program.train(parse_arguments(), PROCESS, THREADS, ALLOCATOR, CPU_REASON)
    if not meter.costs or not meter.steps[False]:
        raise SystemExit("the run was stopped before a step of each kind was measured")
    with_them, without = median(meter.steps[True]), median(meter.steps[False])
    cost = median(meter.costs)
    print(f"\n{'':28} {'ms':>10}")
    print(f"{'step with all of them':28} {1e3 * with_them:10.2f}")
    print(f"{'step without':28} {1e3 * without:10.2f}")
    print(f"{'their own time in a step':28} {1e3 * cost:10.2f}  = {100 * cost / with_them:.3f} % of it")
    machine = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows = [{"step_s": with_them, "step_without_s": without, "cost_s": cost, "steps": len(meter.costs)}]
    figures = {"guard_and_callbacks_share@mini": cost / with_them}
    print(json.dumps({"benchmark": "guard_cost", "machine": machine, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
