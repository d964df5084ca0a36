"""Imports point one way: ops <- model <- export, evaluate <- train <- cli; data knows neither model nor train."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "errors": set(),
    "system": set(),
    "ops": {"errors", "system", "ops"},
    "model": {"errors", "system", "ops", "model"},
    "config": {"errors", "system", "model", "presets"},
    "presets": set(),
    "data": {"errors", "system", "config", "data"},
    "hardware": {"errors", "system", "config", "model", "ops", "hardware"},
    "checkpoints": {"errors", "system", "checkpoints"},
    "export": {"errors", "system", "config", "model", "ops", "data", "checkpoints", "export"},
    "evaluate": {"errors", "system", "config", "model", "ops", "data", "export", "evaluate"},
    "hf": {"errors", "system", "config", "model", "ops", "data", "hf"},
    "doctor": {"errors", "system", "config", "model", "ops", "data", "hardware", "train", "doctor"},
    "report": {"errors", "system", "evaluate", "train", "report"},
    "planning": {"errors", "system", "config", "model", "ops", "hardware", "planning"},
    "train": {"errors", "system", "config", "model", "ops", "data", "hardware", "planning"}
    | {"checkpoints", "export", "evaluate", "train"},
}


def imported_packages(path: Path) -> set[str]:
    """The parts of tbf that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tbf."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tbf.")}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "tbf").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT / "tbf").parts[0].removesuffix(".py")
    if part in ALLOWED:
        assert imported_packages(path) <= ALLOWED[part]


@pytest.mark.parametrize("folder", ["tbf", "tools", "launch", "tests", "benchmarks"])
def test_no_file_grows_beyond_500_lines(folder):
    sizes = {str(p): len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert not {path: lines for path, lines in sizes.items() if lines > 500}
