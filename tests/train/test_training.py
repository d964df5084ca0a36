"""Whole runs of launch/train.py: equal on any number of ranks, exact across a kill, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import torch

from tbf.config import load_run_config
from tbf.model.encoder import TormentedBertFrankenstein
from tests.helpers.runs import DS_ZERO2, DS_ZERO3, command, environment, metrics, train, write_preset


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def straight(cache):
    """20 uninterrupted steps on one rank; the reference of the other tests."""
    run_dir = cache / "straight"
    done = train("--preset", write_preset(cache), "--run-dir", run_dir, cache=cache)
    return run_dir, done


def losses(run_dir, column="loss"):
    return [float(loss) for (loss,) in metrics(run_dir, column) if loss]


def test_a_run_leaves_the_run_folder_and_learns(straight):
    run_dir, done = straight
    for name in ("config.yaml", "ds_config.json", "environment.json", "tokenizer", "metrics.csv", "train.log"):
        assert (run_dir / name).exists(), name
    assert json.loads((run_dir / "run_status.json").read_text())["state"] == "done"
    assert (run_dir / "checkpoints" / "step-00000020" / "manifest.json").exists()
    curve = losses(run_dir)
    assert len(curve) == 20 and curve[-1] < curve[0] - 0.1
    assert losses(run_dir, "val_loss")[-1] < losses(run_dir, "val_loss")[0] - 0.1
    assert "next:" in done.stdout and "--run-dir" in done.stdout


@pytest.fixture(scope="module")
def straight_fp32(cache):
    """The same with FP32 linear layers, where rounding stays rounding."""
    run_dir = cache / "straight-fp32"
    train("--preset", write_preset(cache), "--run-dir", run_dir, "--set", "model.use_bitnet=false", cache=cache)
    return run_dir


@pytest.mark.parametrize(
    ("ds_config", "ranks", "accumulation"),
    [(DS_ZERO2, 2, 1), (DS_ZERO3, 1, 1), (DS_ZERO3, 2, 2), (DS_ZERO2, 1, 2)],
    ids=["zero2-2ranks", "zero3", "zero3-2ranks-accumulating", "zero2-accumulating"],
)
def test_ranks_stages_and_accumulation_give_the_same_losses(straight_fp32, cache, ds_config, ranks, accumulation):
    run_dir = cache / f"{ds_config.stem}-{ranks}-{accumulation}"
    micro = 4 // ranks // accumulation  # the same global batch
    preset = write_preset(cache, micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    arguments = ("--preset", preset, "--run-dir", run_dir, "--set", "model.use_bitnet=false")
    done = train(*arguments, cache=cache, ranks=ranks, ds_config=ds_config)
    model = TormentedBertFrankenstein(load_run_config(run_dir / "config.yaml").model)
    assert f"model: {model.num_parameters():,} parameters" in done.stdout  # also of a model in pieces
    for column in ("loss", "val_loss"):
        assert losses(run_dir, column) == pytest.approx(losses(straight_fp32, column), abs=1e-5)


def test_a_run_resumes_on_other_ranks_and_another_stage(straight_fp32, cache):
    """Step 10 of one rank under ZeRO-2, continued by two ranks under ZeRO-3: the same losses to the end."""
    run_dir, source = cache / "reshaped", straight_fp32 / "checkpoints" / "step-00000010"
    arguments = ("--preset", write_preset(cache, micro_batch_size=2), "--run-dir", run_dir, "--resume", source)
    done = train(*arguments, "--set", "model.use_bitnet=false", cache=cache, ranks=2, ds_config=DS_ZERO3)
    assert "was saved otherwise (rank(s) 1 there, 2 here; as ZeRO stage 2 there, 3 here)" in done.stdout + done.stderr
    assert len(losses(run_dir)) == 10
    assert losses(run_dir) == pytest.approx(losses(straight_fp32)[10:], abs=1e-5)


def test_two_ranks_follow_one_with_ternary_layers(straight, cache):
    """Sums in another order differ in the last bit, which now and then moves an activation or a weight across a
    rounding boundary: losses agree to that, not to FP32 rounding."""
    run_dir = cache / "ternary-2"
    train("--preset", write_preset(cache, micro_batch_size=2), "--run-dir", run_dir, cache=cache, ranks=2)
    assert losses(run_dir) == pytest.approx(losses(straight[0]), abs=1e-3)


def test_killed_and_resumed_equals_straight_bitwise(straight, cache):
    run_dir = cache / "killed"
    arguments = ("--preset", write_preset(cache), "--run-dir", run_dir)
    victim = subprocess.Popen(command(*arguments), env=environment(), cwd=cache, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (run_dir / "checkpoints" / "step-00000010" / "manifest.json").exists():
        assert victim.poll() is None and time.monotonic() < deadline, "no checkpoint before the process ended"
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    resumed = train(*arguments, cache=cache)
    assert "resumed from" in resumed.stdout
    assert metrics(run_dir, "step", "loss", "grad_norm") == metrics(straight[0], "step", "loss", "grad_norm")
    last = "checkpoints/step-00000020/mp_rank_00_model_states.pt"
    ours, theirs = (torch.load(folder / last, weights_only=True)["module"] for folder in (run_dir, straight[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_folder_of_other_settings_is_refused(straight, cache):
    arguments = ("--preset", write_preset(cache), "--run-dir", straight[0])
    before = (straight[0] / "metrics.csv").read_bytes()
    done = train(*arguments, "--set", "model.num_loops=3", cache=cache, expect=2)
    assert "belongs to another configuration: num_loops is 2 there and 3 here" in done.stderr
    assert "Traceback" not in done.stderr
    done = train(*arguments, "--resume", "never", cache=cache, expect=2)
    assert "already holds a run" in done.stderr
    assert (straight[0] / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--data", "EMPTY"), 3, "empty"),
        (("--data", "no/such/place"), 3, "no/such/place"),
        (("--tokenizer", "no/such/tokenizer"), 3, "no/such/tokenizer"),
        (("--resume", "no/such/checkpoint"), 4, "no such checkpoint"),
        (("--set", "train.max_step=3"), 2, "did you mean"),
        (("--preset", "maxi"), 2, "no preset"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_arguments_leave_one_line_and_the_exit_code(cache, arguments, code, words):
    (cache / "EMPTY").mkdir(exist_ok=True)
    arguments = [cache / a if a == "EMPTY" else a for a in arguments]
    preset = () if "--preset" in arguments else ("--preset", write_preset(cache))
    done = train(*preset, *arguments, "--run-dir", cache / "never-made", cache=cache, expect=code)
    assert words in done.stderr and "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert not (cache / "never-made").exists()


def test_without_a_compiler_the_host_adam_of_torch_takes_over(straight, cache, tmp_path):
    """No compiler and no operator built before: said once, same losses but for rounding."""
    env = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"), "PATH": "/nonexistent"}
    run_dir = cache / "no-compiler"
    done = train("--preset", write_preset(cache), "--run-dir", run_dir, "--max-steps", 20, cache=cache, **env)
    assert done.stdout.count("torch's AdamW on the host") == 1
    assert losses(run_dir) == pytest.approx(losses(straight[0]), abs=1e-3)


def test_a_dry_run_writes_nothing(cache):
    done = train("--preset", write_preset(cache), "--run-dir", cache / "dry", "--dry-run", cache=cache)
    assert "one forward and backward pass" in done.stdout and not (cache / "dry").exists()


def test_non_finite_steps_are_skipped_then_halt_with_a_dump(cache):
    """A learning rate that is far too high overflows; the dump holds the batch, a diagnosis and a checkpoint."""
    preset = write_preset(cache, learning_rate=1e30, warmup_steps=0, gradient_clipping=1e30)
    run_dir = cache / "diverged"
    done = train("--preset", preset, "--run-dir", run_dir, cache=cache, expect=6)
    assert "skipped on every rank" in done.stderr + done.stdout and "no healthy checkpoint" in done.stderr
    assert json.loads((run_dir / "run_status.json").read_text())["state"] == "halted"
    (dump,) = (run_dir / "emergency").iterdir()
    assert list(dump.glob("checkpoints/step-*/manifest.json"))
    assert (dump / "batch_rank0.safetensors").exists()
    diagnosis = json.loads((dump / "diagnosis.json").read_text())
    (found,) = diagnosis["ranks"]
    assert diagnosis["skipped_steps"] == [2, 3, 4] and not found["first_bad_module"]["output"]["finite"]
