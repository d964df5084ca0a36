"""Where results go: one JSON file each, in the folder `evaluation` of the export they belong to."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

import tbf
from tbf.errors import DataError

FOLDER = "evaluation"


def result_path(export: Path, name: str) -> Path:
    """The file of a result inside an export; odd characters of `name` are replaced."""
    return export / FOLDER / (re.sub(r"[^\w.-]+", "_", name) + ".json")


def check_writable(path: Path) -> Path:
    """Makes the folder of a result before hours are spent on it. Raises DataError where that is not allowed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another file with --out") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"cannot write {path}; choose another file with --out")
    return path


def save_result(path: Path, result: dict[str, Any]) -> Path:
    """Writes a result, whole or not at all, over an earlier one. Raises DataError where that is not allowed."""
    stamp = {
        "tbf_version": tbf.__version__,
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_text(json.dumps({**stamp, **result}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; choose another file with --out") from None
    return path


def read_results(export: Path) -> list[dict[str, Any]]:
    """All results beside an export, by file name; what is no result of ours is left out."""
    found = []
    for path in sorted((export / FOLDER).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(result, dict) and "kind" in result:
            found.append({"name": path.stem, **result})
    return found
