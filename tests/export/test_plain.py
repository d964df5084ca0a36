from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tbf.errors import CheckpointError, ConfigError
from tbf.export.plain import export_run, load_pretrained
from tests.export.test_deepspeed_files import Evil
from tests.export.tiny_runs import TEXT, tiny_config, tiny_model, tiny_tokenizer, write_export

Runs = dict[str, tuple[Path, dict[int, dict[str, torch.Tensor]]]]


@pytest.fixture
def run(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the one-rank ZeRO-2 run, to be damaged."""
    return Path(shutil.copytree(runs["zero2"][0], tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(model: torch.nn.Module, live: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "format"), [("zero1", "safetensors"), ("zero2", "torch"), ("zero3", "safetensors"), ("zero3", "torch")]
)
def test_export_is_the_live_model(runs: Runs, name: str, format: str, tmp_path: Path) -> None:
    run_dir, live = runs[name]
    out = export_run(run_dir, tmp_path / "out", format=format)
    model, tokenizer = load_pretrained(out)
    assert same(model, live[4])
    assert not model.training
    assert (out / "tokenizer.model").read_bytes() == (run_dir / "tokenizer" / "tokenizer.model").read_bytes()
    assert tokenizer.vocab_size == model.config.vocab_size
    weights = "model.safetensors" if format == "safetensors" else "pytorch_model.pt"
    files = {weights, "config.json", "export.json", "tokenizer.model", "tokenizer_config.json"}
    assert contents(out).keys() == files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    facts = json.loads((out / "export.json").read_text())
    assert (facts["step"], facts["val_loss"], facts["train_loss"], facts["tokens"]) == (4, 2.5, 6.0, 96)
    assert facts["engine"]["zero_stage"] == int(name[-1])
    assert facts["parameters"] == sum(value.numel() for value in live[4].values())
    assert facts["verified"]["logits_max_abs_error"] == 0.0
    assert facts["verified"]["tensors_equal"] == len(live[4])


@pytest.mark.parametrize(("step", "expected"), [("best", 2), (2, 2), ("4", 4), ("latest", 4)])
def test_step_is_chosen(runs: Runs, step: str | int, expected: int, tmp_path: Path) -> None:
    run_dir, live = runs["zero2"]
    model, _ = load_pretrained(export_run(run_dir, tmp_path / "out", step=step, verify=False))
    assert same(model, live[expected])


def test_one_checkpoint_of_a_run(runs: Runs, tmp_path: Path) -> None:
    run_dir, live = runs["zero3"]
    model, tokenizer = load_pretrained(export_run(run_dir / "checkpoints" / "step-00000002", tmp_path / "out"))
    assert same(model, live[2])
    assert tokenizer is not None


def test_bare_deepspeed_folder(runs: Runs, tmp_path: Path) -> None:
    run_dir, live = runs["zero1"]
    bare = tmp_path / "bare"
    shutil.copytree(run_dir / "checkpoints" / "step-00000004", bare / "tag", ignore=shutil.ignore_patterns("*.json"))
    (bare / "latest").write_text("tag")
    with pytest.raises(CheckpointError, match="pass --config"):
        export_run(bare, tmp_path / "out")
    out = export_run(bare, tmp_path / "out", config=run_dir / "config.yaml", tokenizer=run_dir / "tokenizer")
    model, tokenizer = load_pretrained(out)
    assert same(model, live[4])
    assert tokenizer is not None
    without = export_run(bare / "tag", tmp_path / "out2", config=out / "config.json", verify=False)
    assert load_pretrained(without)[1] is None


def test_checkpoint_taken_out_of_its_run_keeps_its_config(runs: Runs, tmp_path: Path) -> None:
    run_dir, live = runs["zero2"]
    shutil.copytree(run_dir / "checkpoints" / "step-00000004", tmp_path / "alone")
    model, _ = load_pretrained(export_run(tmp_path / "alone", tmp_path / "out", verify=False))
    assert same(model, live[4])


def test_existing_export_is_kept_without_force(run: Path, tmp_path: Path) -> None:
    out = export_run(run, tmp_path / "out", step=2, verify=False)
    before = contents(out)
    with pytest.raises(CheckpointError, match="--force"):
        export_run(run, out, step=4, verify=False)
    assert contents(out) == before
    export_run(run, out, step=4, verify=False, force=True)
    assert contents(out)["model.safetensors"] != before["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_force_replaces_nothing_but_an_export(run: Path, tmp_path: Path) -> None:
    for target in (run, tmp_path):
        with pytest.raises(CheckpointError, match="not an export"):
            export_run(run, target, force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not an export"):
        export_run(run, tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_failed_forced_export_keeps_the_old_one(run: Path, tmp_path: Path) -> None:
    out = export_run(run, tmp_path / "out", verify=False)
    before = contents(out)
    spoil_master(run / "checkpoints" / "step-00000004", with_manifest=False)
    with pytest.raises(CheckpointError):
        export_run(run / "checkpoints" / "step-00000004", out, force=True)
    assert contents(out) == before


def spoil_master(folder: Path, *, with_manifest: bool, amount: float = 1e-3) -> None:
    """Changes one value of the masters; without a manifest only the verification can find out."""
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    optimizer = content["optimizer_state_dict"]
    groups = optimizer.get("single_partition_of_fp32_groups") or optimizer["fp32_flat_groups"]
    groups[0].data[7] += amount
    torch.save(content, path)
    if not with_manifest:
        (folder / "manifest.json").unlink()


def test_verification_catches_a_corrupt_tensor(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints" / "step-00000004"
    spoil_master(folder, with_manifest=False)
    with pytest.raises(CheckpointError, match=r"differs by 1\.0.e-03"):
        export_run(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_manifest_catches_a_corrupt_file_and_the_older_step_is_taken(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, runs: Runs
) -> None:
    spoil_master(run / "checkpoints" / "step-00000004", with_manifest=True)
    model, _ = load_pretrained(export_run(run, tmp_path / "out", verify=False))
    assert same(model, runs["zero2"][1][2])
    assert "SKIPPING" in caplog.text
    with pytest.raises(CheckpointError, match="is damaged: zero_pp_rank_0"):
        export_run(run, tmp_path / "out2", step=4)


def test_diverged_weights_are_refused(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints" / "step-00000004"
    for path in folder.glob("mp_rank_00_model_states.pt"):
        content = torch.load(path, weights_only=False)
        content["module"]["head.dense.weight"].fill_(torch.nan)
        torch.save(content, path)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        export_run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_of_another_model(run: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_tokenizer(), num_layers=5)
    config.save(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match=r"layers\.5.*not in the model"):
        export_run(run, tmp_path / "out", config=tmp_path / "other.json")
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_vocabulary(run: Path, tmp_path: Path) -> None:
    from tbf.data.tokenizer import SpanishSPMTokenizer

    SpanishSPMTokenizer.train(["a b c d e f"], 300).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="the tokenizer has"):
        export_run(run, tmp_path / "out", tokenizer=tmp_path / "other", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": "newest"}, ConfigError, "use latest, best or a step"),
        ({"step": 3}, CheckpointError, "no checkpoint of step 3; there are: 2, 4"),
        ({"format": "safetensor"}, ConfigError, "did you mean 'safetensors'"),
        ({"config": "absent.yaml"}, CheckpointError, "cannot read absent.yaml"),
        ({"tokenizer": "absent"}, CheckpointError, "tokenizer absent is missing"),
    ],
)
def test_wrong_arguments(runs: Runs, arguments: dict, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export_run(runs["zero2"][0], tmp_path / "out", **arguments)
    assert not any(tmp_path.iterdir())


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint that is complete"):
        export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a folder"):
        export_run(tmp_path / "absent", tmp_path / "out")


def test_unwritable_target(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the export"):
        export_run(runs["zero2"][0], tmp_path / "file" / "out", verify=False)


def test_leftovers_of_a_killed_export_are_swept(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys, os, signal\nfrom tbf.export import plain\n"
        "plain.write_weights = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "plain.export_run(sys.argv[1], sys.argv[2])\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", program, str(run), str(tmp_path / "out")], env=env)
    assert killed.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
    export_run(run, tmp_path / "out", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    write_export(tmp_path, tokenizer)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_pretrained(tmp_path)
    assert torch.equal(torch.rand(2), expected)


def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(TEXT, return_tensors="pt")
    model, _ = load_pretrained(write_export(tmp_path, tokenizer))
    with torch.no_grad():
        expected = tiny_model(tokenizer)(**ids)
        assert torch.equal(model(**ids).last_hidden_state, expected.last_hidden_state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_converter_is_spared_torchs_decompositions() -> None:
    """Drawing into meta tensors would import sympy, a fifth of the memory that a conversion needs."""
    program = (
        "import sys\nfrom tbf import UltraConfig\nfrom tbf.export.plain import build_without_drawing\n"
        "from tests.helpers.runs import TINY\nbuild_without_drawing(UltraConfig(vocab_size=99, **TINY['model']))\n"
        "sys.exit('sympy' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=env).returncode == 0


@pytest.mark.parametrize("format", ["safetensors", "torch", "ternary"])
def test_converting_twice_gives_the_same_bytes(runs: Runs, format: str, tmp_path: Path) -> None:
    first, second = (
        export_run(runs["zero3"][0], tmp_path / name, format=format, verify=False) for name in ("first", "second")
    )
    ours, theirs = contents(first), contents(second)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name != "export.json")  # which holds the time


@pytest.mark.parametrize("name", ["model.safetensors", "model.ternary.safetensors", "pytorch_model.pt"])
def test_a_pickle_in_place_of_weights_is_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_export(tmp_path / "export", tiny_tokenizer())
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_pretrained(folder)
    assert not Path("pwned").exists()


def test_broken_exports_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    good = write_export(tmp_path / "good", tokenizer)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    with pytest.raises(CheckpointError, match="is no export"):
        load_pretrained(tmp_path)
    cut = broken("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_pretrained(cut.parent)
    evil = broken("evil")
    (evil / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_pretrained(evil)
    torch.save({"x": Evil()}, evil / "pytorch_model.pt")
    with pytest.raises(CheckpointError, match="wants to run code"):
        load_pretrained(evil)
    config = broken("config") / "config.json"
    config.write_text(config.read_text().replace('"num_loops"', '"loops"'))
    with pytest.raises(ConfigError, match="unknown model key 'loops'"):
        load_pretrained(config.parent)
    wider = broken("wider")
    tiny_config(tokenizer, ffn_hidden_size=32).save(wider / "config.json")
    with pytest.raises(CheckpointError, match="the model's is"):
        load_pretrained(wider)


def test_converter_program(runs: Runs, repo_root: Path, tmp_path: Path) -> None:
    """As a user runs it: no DeepSpeed importable, then loaded by a process that never saw one."""
    run_dir, live = runs["zero3"]
    blocked = tmp_path / "blocked" / "deepspeed"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('blocked by the test')")
    env = {**os.environ, "PYTHONPATH": str(blocked.parent)}
    command = [sys.executable, str(repo_root / "tools" / "convert_ckpt.py"), str(run_dir), str(tmp_path / "out")]
    done = subprocess.run([*command, "--step", "best"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "step 2" in done.stdout
    assert "verified: logits differ by at most 0.0e+00" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 4
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    program = (
        "import sys, torch\nfrom tbf.export.plain import load_pretrained\n"
        "model, tokenizer = load_pretrained(sys.argv[1])\n"
        "torch.save(model.state_dict(), sys.argv[2])\nassert 'deepspeed' not in sys.modules\n"
    )
    env["PYTHONPATH"] = os.pathsep.join([str(blocked.parent), str(repo_root)])
    weights = tmp_path / "weights.pt"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out"), str(weights)], check=True, env=env)
    loaded = torch.load(weights)
    assert all(torch.equal(value, live[2][name]) for name, value in loaded.items())


def test_converter_refuses_wrong_usage(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repo_root / "tools" / "convert_ckpt.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert "python tools/convert_ckpt.py runs/mini-1 exported" in shown.stdout
    assert "{safetensors,torch,hf,ternary}" in shown.stdout
    for arguments, code in [(["x", "out", "--format", "onnx"], 2), ([str(tmp_path), str(tmp_path / "out")], 4)]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
