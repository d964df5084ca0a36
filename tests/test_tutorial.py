"""The tutorials' commands run as they stand, and both languages give the same ones."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import environment
from tests.test_docs import ROOT, blocks

PAGES = ("docs/tutorial_en.md", "docs/tutorial_es.md")
SHORTER = ["--max-steps", "4"]  # after the page's own --max-steps; nothing else is changed


def test_both_languages_give_the_same_commands() -> None:
    english, spanish = (blocks("bash", page) for page in PAGES)
    assert english == spanish
    assert len([line for block in english for line in block.splitlines()]) > 12
    code = [[line.partition("#")[0] for line in blocks("python", page)[0].splitlines()] for page in PAGES]
    assert code[0] == code[1]


@pytest.mark.slow
def test_the_tutorial_leads_from_text_to_vectors(tmp_path: Path) -> None:
    for name in ("launch", "tools", "ds_configs", "tbf"):
        (tmp_path / name).symlink_to(ROOT / name)
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    env = environment(PYTHONPATH=str(ROOT), XDG_CACHE_HOME=cache)
    env.pop("OMP_NUM_THREADS")
    shown = {}
    for line in [line for block in blocks("bash", PAGES[0]) for line in block.splitlines()]:
        words = shlex.split(line)
        if words[0] == "tbf":
            words = [sys.executable, "-m", "tbf.cli", *words[1:]]
        elif "launch/train.py" in words:
            words += SHORTER
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        shown[line] = done.stdout
    vectors = np.load(tmp_path / "vectores.npy")
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    code = blocks("python", PAGES[0])[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cosines = np.array([float(word) for word in done.stdout.replace("[", " ").replace("]", " ").split()]).reshape(3, 3)
    np.testing.assert_allclose(cosines, vectors @ vectors.T, atol=1e-4)  # plain and ternary exports agree
    assert "<svg" in (tmp_path / "runs/tutorial/report.html").read_text(encoding="utf-8")
    assert "pseudo-perplexity" in next(text for line, text in shown.items() if line.startswith("tbf eval"))
