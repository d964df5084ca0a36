"""The commands and the Python of docs/export.md run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import environment


def test_the_pages_commands_and_python_run_in_order(runs: dict, repo_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    page = (repo_root / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mini-1").symlink_to(runs["zero2"][0])
    (tmp_path / "tools").symlink_to(repo_root / "tools")
    env = environment(PYTHONPATH=str(repo_root))
    commands = [line for language, text in blocks if language == "bash" for line in text.splitlines()]
    assert len(commands) > 3
    for line in commands:
        program, *words = shlex.split(line)
        start = {"tbf": [sys.executable, "-m", "tbf.cli"], "python": [sys.executable]}[program]
        done = subprocess.run([*start, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert ("bytes for each of" in done.stdout) == ("ternary" in line)
    transformers, sentences = (text for language, text in blocks if language == "python")
    shown = {}
    for code in (transformers, sentences):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown[code] = done.stdout
    assert shown[transformers].startswith("torch.Size([1, 32])")
    assert shown[sentences].splitlines()[-1] == "(2, 32)"
