"""The README's commands are run as they stand; links in the docs lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import environment

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(p for p in ROOT.rglob("*.md") if not {".venv", "runs"} & set(p.relative_to(ROOT).parts))

# Fewer and smaller steps than a reader's: appended to the training commands, nothing else is changed.
SHORTER = "--max-steps 3 --set data.seq_len=64 --set train.micro_batch_size=2 --set train.eval_rows=2"


def blocks(language: str, page: str = "README.md") -> list[str]:
    return [text for found, text in BLOCK.findall((ROOT / page).read_text("utf-8")) if found == language]


def test_the_readmes_commands_run_in_order(tmp_path):
    """Every command of the README's bash blocks, then its Python, in a fresh folder that sees the clone's files."""
    for name in ("launch", "tools", "ds_configs", "tbf", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = environment(
        PYTHONPATH=str(ROOT), XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    )
    env.pop("OMP_NUM_THREADS")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert {"make train", "make test"} <= set(commands)
    for line in commands:
        words = shlex.split(line)
        if words[0] == "make":  # what make would run: installing and testing inside a test would never end
            words = ["make", "-n", *words[1:]]
        elif "launch/train.py" in words:
            words += SHORTER.split()
        elif words[0] == "tbf":
            words = [sys.executable, "-m", "tbf.cli", *words[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "torch.Size([1, 384])"


def test_the_data_pages_commands_run_in_order(tmp_path):
    env = environment(PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(tmp_path / "cache"))
    commands = [line for block in blocks("bash", "docs/data.md") for line in block.splitlines() if line]
    assert len(commands) > 3
    for line in commands:
        verb, *words = shlex.split(line)
        assert verb == "tbf"
        command = [sys.executable, "-m", "tbf.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_make_train_runs_exactly_the_documented_command():
    quiet = ["make", "-n", "--no-print-directory", "train"]
    shown = subprocess.run(quiet, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = "deepspeed launch/train.py --ds_config ds_configs/p40_zero2.json"
    assert shown.splitlines()[-1] == command
    assert f"\n    {command}\n" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index]
