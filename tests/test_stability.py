"""The stability benchmark runs alone and says what the documentation quotes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import environment

ROOT = Path(__file__).resolve().parent.parent


def benchmark(*arguments: str) -> dict:
    line = [sys.executable, str(ROOT / "benchmarks" / "stability.py"), *arguments]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_ode_layer_holds_its_bound_and_the_unbounded_one_does_not():
    figures = benchmark("--ode", "--quick")["figures"]
    bounded = [gain for name, gain in figures.items() if name.startswith("bounded")]
    assert len(bounded) == 16 and max(bounded) <= 1.3
    assert figures["unbounded_gain@rk4x2,weights_x10"] > 3


def test_small_twins_train_without_spikes():
    result = benchmark("--steps", "8", "--presets", "mini", "mini_moe")
    assert [row["preset"] for row in result["rows"]] == ["mini", "mini_moe"]
    for row in result["rows"]:
        assert row["skipped"] == 0 and row["max_grad_norm"] <= 10
        assert row["last_loss"] < row["first_loss"]
