"""What is to be exported: from the path a user gives to a checkpoint folder, its configuration and its tokenizer.

Three kinds of path are understood: a run folder, one checkpoint of a run, and a bare DeepSpeed folder (with or without
its `latest` file), which needs `--config`. Everything here works alone, so that one rank of a job may call it.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tbf.errors import CheckpointError, ConfigError
from tbf.model.config import UltraConfig

logger = logging.getLogger(__name__)

CONFIG_META = ("model_type", "architectures", "tbf_format", "tbf_version")
"""Keys of an exported config.json beside those of UltraConfig."""


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint and what belongs to it."""

    folder: Path
    """Holds DeepSpeed's *_states.pt files."""
    config: UltraConfig
    tokenizer: Path | None
    """Folder or .model file; None: the export goes without."""
    origin: dict[str, Any]
    """What is known of the run, as plain JSON values: its data, its losses at this step, versions."""


def find_source(
    path: str | Path, step: str | int = "latest", config: str | Path | None = None, tokenizer: str | Path | None = None
) -> ExportSource:
    """Finds what `path` means. `step` ("latest", "best" or a number) chooses among the checkpoints of a run.

    `config` (a run's config.yaml or an export's config.json) and `tokenizer` replace those of the run.
    Raises CheckpointError when there is no whole checkpoint, ConfigError when a configuration is malformed.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a run folder or a checkpoint folder")
    if (path / "checkpoints").is_dir():
        folder = _choose(path / "checkpoints", step)
    elif any(path.glob("step-*/manifest.json")):
        folder = _choose(path, step)
    else:
        folder = _bare(path)
        if (folder / "manifest.json").exists():
            _require_whole(folder)
        if str(step) != "latest":
            raise CheckpointError(f"--step {step} needs a run folder to choose from; {path} is a single checkpoint")
    run = folder.parent.parent if (folder.parent.parent / "config.yaml").is_file() else None
    settings = _read_settings(Path(config)) if config else _settings_of(folder, run)
    chosen = Path(tokenizer) if tokenizer else run / "tokenizer" if run else None
    if chosen is not None and not chosen.exists():
        raise CheckpointError(f"the tokenizer {chosen} is missing; give its folder or .model file with --tokenizer")
    return ExportSource(folder, _model_config(settings, folder), chosen, _origin(folder, run, settings))


def read_config(path: Path) -> UltraConfig:
    """Reads the model's configuration from an export's config.json or a run's config.yaml."""
    return _model_config(_read_settings(path), path)


def _choose(root: Path, step: str | int) -> Path:
    """The newest, best or named checkpoint whose files are whole; damaged ones are reported and passed over.

    CheckpointFolder.find does the same for all ranks of a job together, and would wait for them here.
    """
    from tbf.checkpoints.folder import CheckpointFolder, by_loss, folder_name, step_of

    folders = sorted((path for path in root.glob("step-*") if step_of(path) >= 0), key=step_of, reverse=True)
    lack = "that is complete"
    if str(step) == "best":
        folders, lack = [path for path, _ in by_loss(CheckpointFolder(root).entries())], "with a validation loss"
    elif str(step).isdecimal():
        steps = ", ".join(str(step_of(path)) for path in reversed(folders)) or "none"
        folders = [path for path in folders if path.name == folder_name(int(step))]
        lack = f"of step {step}; there are: {steps}"
    elif str(step) != "latest":
        raise ConfigError(f"--step {step} names no checkpoint; use latest, best or a step such as 500")
    for folder, following in zip(folders, [*folders[1:], None]):
        try:
            _require_whole(folder)
        except CheckpointError as error:
            if following is None:
                raise
            logger.error("SKIPPING %s; falling back to %s", error, following.name)
        else:
            return folder
    raise CheckpointError(f"{root} holds no checkpoint {lack}")


def _require_whole(folder: Path) -> None:
    """Reads every file against the manifest. Raises CheckpointError that names the first one that differs."""
    from tbf.checkpoints.manifest import Manifest

    manifest = Manifest.read(folder)
    problems = manifest.missing_files(folder)
    for name in manifest.files if not problems else ():
        if problem := manifest.problem_with(folder, name):
            problems.append(problem)
            break
    if problems:
        raise CheckpointError(f"{folder} is damaged: {problems[0]}; export another step")


def _bare(path: Path) -> Path:
    """The folder itself, or the one that DeepSpeed's `latest` names in it."""
    latest = path / "latest"
    if not any(path.glob("*_states.pt")) and latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not tag or Path(tag).name != tag or not (path / tag).is_dir():
            raise CheckpointError(
                f"{latest} names '{tag[:80]}', which is not a folder beside it; give the folder itself"
            )
        return path / tag
    return path


def _settings_of(folder: Path, run: Path | None) -> dict[str, Any]:
    if run:
        return _read_settings(run / "config.yaml")
    try:
        model = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["model"]
        return {"model": UltraConfig.from_dict(model).to_dict()}
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        raise CheckpointError(
            f"{folder} does not lie in a run folder, so the model's shape is unknown; "
            "pass --config with the run's config.yaml or an export's config.json"
        ) from None


def _read_settings(path: Path) -> dict[str, Any]:
    """{"model": ..., and "data", "train" where known} of a config file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise CheckpointError(f"cannot read {path}: {reason}; give a config.yaml or config.json") from None
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is not valid YAML or JSON: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no settings; give a run's config.yaml or an export's config.json")
    if isinstance(content.get("model"), dict):
        return content
    if "transformers_version" in content:  # saved by transformers, among settings of its own
        names = {field.name for field in dataclasses.fields(UltraConfig)}
        return {"model": {key: value for key, value in content.items() if key in names}}
    return {"model": {key: value for key, value in content.items() if key not in CONFIG_META}}


def _model_config(settings: dict[str, Any], where: Path) -> UltraConfig:
    try:
        return UltraConfig.from_dict(settings["model"])
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _origin(folder: Path, run: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    data = settings.get("data") if isinstance(settings.get("data"), dict) else {}
    manifest, state = _read_json(folder / "manifest.json"), _read_json(folder / "trainer_state.json")
    kept = ("source", "seq_len", "mask_rate")
    return {
        "run": run.name if run else None,
        "preset": settings.get("preset"),
        "checkpoint": folder.name,
        "saved_at": manifest.get("saved_at"),
        "versions": manifest.get("versions"),
        "hardware": _hardware(run / "environment.json") if run else None,
        "tokens": state.get("tokens"),
        "train_loss": _train_loss(run / "metrics.csv", manifest.get("step")) if run else None,
        "val_loss": manifest.get("val_loss"),
        "data": {key: data[key] for key in kept if key in data},
    }


def _hardware(environment: Path) -> dict[str, Any] | None:
    """The machine of the run's last start."""
    try:
        start = json.loads(environment.read_text(encoding="utf-8"))[-1]
        return {key: start[key] for key in ("gpus", "cpu_cores", "host_memory_gb")}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _train_loss(metrics: Path, step: int | None) -> float | None:
    """The logged training loss nearest below `step`, nats per masked token."""
    try:
        with metrics.open(encoding="utf-8", newline="") as file:
            rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row.get("loss")]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return next((loss for at, loss in reversed(rows) if step is not None and at <= step), None)
