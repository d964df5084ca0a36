"""The run folder: which one a command means, and the files that describe it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import yaml

import tbf
from tbf.checkpoints.files import run_lock, to_json, write_atomic
from tbf.config import FREE_DATA, RunConfig
from tbf.errors import CheckpointError, ConfigError
from tbf.train.ds_config import EngineConfig
from tbf.train.environment import ProcessInfo

CONFIG_FILE = "config.yaml"
_BEFORE_CONFIG = (".lock", "tokenizer", "ds_config.json", f".{CONFIG_FILE}.tmp-", ".ds_config.json.tmp-")
"""All that a start which was cut off before config.yaml can have left."""


def choose_run_dir(run_dir: str | None, resume: str, run: RunConfig) -> tuple[Path, str | None]:
    """Returns the run folder and what to resume in it ("latest", a checkpoint's path, or None for a fresh start).

    Without a folder: the newest unfinished `runs/<preset>-<n>` of the same settings under `--resume auto`, else the
    next free number. Raises ConfigError when a named folder belongs to other settings, CheckpointError when what
    `--resume` names is not there.
    """
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"--resume {resume}: no such checkpoint folder; give auto, never or a checkpoint's path"
            )
        owner = checkpoint.resolve().parent.parent
        return (Path(run_dir) if run_dir else owner), str(checkpoint)
    if run_dir is None:
        return _unnamed_run_dir(resume, run)
    folder = Path(run_dir)
    if not (folder / CONFIG_FILE).exists():
        if folder.exists() and not all(path.name.startswith(_BEFORE_CONFIG) for path in folder.iterdir()):
            raise ConfigError(
                f"--run-dir {folder} holds other files but no {CONFIG_FILE}; choose an empty or new folder"
            )
        return folder, None
    if resume == "never":
        raise ConfigError(
            f"--run-dir {folder} already holds a run; choose another folder, or --resume auto to continue it"
        )
    _refuse_other_settings(folder, run)
    return folder, "latest" if has_checkpoints(folder) else None


def has_checkpoints(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


def write_run_files(
    folder: Path,
    run: RunConfig,
    engine: EngineConfig,
    tokenizer: Any,
    process: ProcessInfo,
    held: contextlib.ExitStack,
) -> None:
    """Locks the folder through `held` and, at the first start, writes config.yaml, ds_config.json and tokenizer/.

    A resumed run keeps them; config.yaml comes last and says that the others are whole. Each start adds itself to
    environment.json, which tells which versions did what.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(run_lock(folder))
        if not (folder / CONFIG_FILE).exists():
            tokenizer.save_pretrained(folder / "tokenizer")
            write_atomic(folder / "ds_config.json", to_json(engine.config))
            write_atomic(folder / CONFIG_FILE, run.to_yaml().encode())
        report = folder / "environment.json"
        starts = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
        write_atomic(report, to_json([*starts, environment(process)]))
    except OSError as error:
        raise CheckpointError(
            f"cannot write the run folder {folder}: {error.strerror}; choose another --run-dir"
        ) from None


def environment(process: ProcessInfo) -> dict[str, Any]:
    """Versions, git state and hardware of one start."""
    return {
        "tbf": tbf.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "git": _git_state(),
        "process": dataclasses.asdict(process),
        "threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "host_memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _unnamed_run_dir(resume: str, run: RunConfig) -> tuple[Path, str | None]:
    folders = {}
    for folder in Path("runs").glob(f"{run.preset}-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit():
            folders[int(number)] = folder
    newest = max(folders, default=0)
    if resume == "auto" and newest and _is_unfinished(folders[newest], run):
        return folders[newest], "latest" if has_checkpoints(folders[newest]) else None
    return Path("runs") / f"{run.preset}-{newest + 1}", None


def _is_unfinished(folder: Path, run: RunConfig) -> bool:
    try:
        saved = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        status = json.loads((folder / "run_status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return saved == run.to_dict() and status.get("state") not in ("done", "halted")


def _refuse_other_settings(folder: Path, run: RunConfig) -> None:
    """Data order and architecture must agree; the schedule's length and bookkeeping may be changed on resume."""
    try:
        saved = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        theirs = {
            **saved["model"],
            **{f"data.{k}": v for k, v in saved["data"].items()},
            "seed": saved["train"]["seed"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read ({error}); choose another --run-dir") from None
    ours = run.to_dict()
    mine = {**ours["model"], **{f"data.{k}": v for k, v in ours["data"].items()}, "seed": ours["train"]["seed"]}
    free = {f"data.{key}" for key in FREE_DATA}
    different = [
        key for key in sorted(mine.keys() | theirs.keys()) if key not in free and mine.get(key) != theirs.get(key)
    ]
    if different:
        key = different[0]
        raise ConfigError(
            f"{folder} belongs to another configuration: {key} is {theirs.get(key)!r} there and {mine.get(key)!r} here"
            f"{f' (and {len(different) - 1} more)' if len(different) > 1 else ''}; choose another --run-dir"
        )


def _git_state() -> str:
    """Commit of the code, with `-dirty` when it had changes; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
