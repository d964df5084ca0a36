"""Plain exports: one folder with weights, config.json, tokenizer and export.json that loads without DeepSpeed."""

from __future__ import annotations

import datetime
import glob
import json
import logging
import os
import platform
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

import tbf
from tbf.errors import CheckpointError, ConfigError, DataError, nearest
from tbf.export.deepspeed_files import DeepSpeedCheckpoint
from tbf.export.hf import ARCHITECTURE, write_card, write_hf_files
from tbf.export.source import CONFIG_META, ExportSource, find_source, read_config
from tbf.export.ternary import packed_slices, packed_tensors, size_report
from tbf.export.verify import verify_export
from tbf.export.weights import (
    FILE_NAMES,
    check_shapes,
    load_strict,
    read_weights,
    tied_names,
    total_bytes,
    weight_format,
    write_weights,
)
from tbf.model.config import UltraConfig
from tbf.system import exchange, sync_folder

if TYPE_CHECKING:
    from tbf.data.tokenizer import SpanishSPMTokenizer
    from tbf.model.encoder import TormentedBertFrankenstein

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
EXPORT_NAME = "export.json"
_REPLACED = ".replaced"


def export_run(
    checkpoint_or_run: str | Path,
    out: str | Path,
    *,
    format: str = "safetensors",
    step: str | int = "latest",
    verify: bool = True,
    force: bool = False,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    license: str | None = None,
) -> Path:
    """Writes the weights of a run, or of one checkpoint, as a folder that `load_pretrained` reads; returns the folder.

    The folder appears whole or not at all. `verify` proves it first (see tbf.export.verify) and writes nothing when
    that fails. `force` replaces an earlier export, and nothing else. `config` and `tokenizer` serve checkpoints that
    lie outside a run folder. `license` is named in the model card of the format hf.

    Raises CheckpointError when the checkpoint is damaged, incomplete or not of this model, or when `out` exists;
    ConfigError on an unknown format or a malformed configuration.
    """
    if format not in FILE_NAMES:
        raise ConfigError(f"export format '{format}' is unknown; {nearest(format, FILE_NAMES)}")
    out = Path(out)
    _check_target(out, force)
    if license and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise ConfigError(f"license '{license}' is no identifier; give one as Hugging Face lists them, e.g. apache-2.0")
    source = find_source(checkpoint_or_run, step, config, tokenizer)
    checkpoint = DeepSpeedCheckpoint(source.folder)
    logger.info("reading %s: ZeRO-%d, %d rank(s)", source.folder, checkpoint.stage, checkpoint.world_size)
    if verify and not checkpoint.has_masters:
        raise CheckpointError(f"{source.folder} has no optimizer shards to verify against; pass --no-verify")
    aside = out.absolute().parent / f".{out.name}.partial-{platform.node()}-{os.getpid()}"
    try:
        _sweep(aside, out)
        aside.mkdir(parents=True)
        facts = _write(aside, source, checkpoint, format)
        if verify:
            logger.info("verifying in a fresh process")
        report = verify_export(aside, source.folder) if verify else None
        facts = _provenance(source, checkpoint, format, facts, report)
        _write_json(aside / EXPORT_NAME, facts)
        if format == "hf":
            write_card(aside, facts, source.config, license)
        _publish(aside, out)
    except OSError as error:
        where = error.filename or out
        raise CheckpointError(f"cannot write the export: {where}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def load_pretrained(
    folder: str | Path, *, fast: bool = False
) -> tuple[TormentedBertFrankenstein, SpanishSPMTokenizer | None]:
    """Loads an export: the model in evaluation mode, on the CPU, and its tokenizer (None if exported without).

    A ternary export gives a model for inference: its ternary layers hold packed weights and have no gradients. `fast`
    lets it compute by compiled code of its own, several times as fast, whose numbers are close (see tbf.model.fast).

    Raises CheckpointError when the folder is no export, is damaged, or does not fit this version of tbf; with `fast`,
    ConfigError when the model can't be and HardwareError when the machine can't.
    """
    from tbf.model.bitlinear import invalidate_ternary

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        cure = "make one with tools/convert_ckpt.py" if folder.is_dir() else "check the path"
        raise CheckpointError(f"{folder} is no export: it has no config.json; {cure}")
    config = read_config(folder / "config.json")
    weights = read_weights(folder)
    if all(name.startswith("tbf.") for name in weights):  # as the models of tbf.hf save them
        weights = {name.removeprefix("tbf."): value for name, value in weights.items()}
    model = build_without_drawing(config, packed=weight_format(folder) == "ternary")
    load_strict(model, weights, folder)
    invalidate_ternary()
    if fast:
        from tbf.model.fast import make_fast

        make_fast(model)
    return model.eval(), _load_tokenizer(folder, config)


def build_without_drawing(config: UltraConfig, *, packed: bool = False) -> TormentedBertFrankenstein:
    """A model whose weights are about to be loaded: drawing a billion initial ones first would take a minute.

    What loading doesn't fill (ties, buffers outside the state dict) is built the long way. `packed` puts packed layers
    in the place of ternary ones.
    """
    from tbf.model.encoder import TormentedBertFrankenstein
    from tbf.model.packed import pack_layers

    with torch.random.fork_rng(devices=[]):
        model = shapes_only(config)
        whole = tied_names(model) or {name for name, _ in model.named_buffers()} - model.state_dict().keys()
        if whole:
            model = TormentedBertFrankenstein(config)
    if packed:
        pack_layers(model)
    # to_empty would do the same through empty_like, whose meta form makes torch import sympy.
    return model if whole else model._apply(lambda value: torch.empty(value.shape, dtype=value.dtype, device="cpu"))


def shapes_only(config: UltraConfig) -> TormentedBertFrankenstein:
    """A model on the meta device."""
    from tbf.model.encoder import TormentedBertFrankenstein
    from tbf.model.init import NoDraws

    with torch.device("meta"), NoDraws():
        return TormentedBertFrankenstein(config)


def _load_tokenizer(folder: Path, config: UltraConfig) -> SpanishSPMTokenizer | None:
    if not (folder / "tokenizer.model").is_file():
        return None
    from tbf.data.tokenizer import SpanishSPMTokenizer

    tokenizer = SpanishSPMTokenizer.from_pretrained(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; "
            "export again with the tokenizer of the run"
        )
    return tokenizer


def _check_target(out: Path, force: bool) -> None:
    """An export never overwrites anything but an earlier export, and that only with `force`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / EXPORT_NAME).is_file():
        raise CheckpointError(f"{out} exists and is not an export of tbf; choose another folder")
    if not force:
        raise CheckpointError(f"{out} already holds an export; pass --force to replace it, or choose another folder")


def _write(aside: Path, source: ExportSource, checkpoint: DeepSpeedCheckpoint, format: str) -> dict[str, Any]:
    """Writes weights, configuration and tokenizer; returns the sizes of what was written."""
    tensors = checkpoint.weights()
    model = shapes_only(source.config)  # so that a wrong config is found before anything is written
    check_shapes(model, {name: tensor.shape for name, tensor in tensors.items()}, source.folder)
    facts: dict[str, Any] = {"parameters": model.num_parameters()}
    if format == "ternary":
        slices = packed_slices(model)
        facts["ternary"] = size_report(tensors, slices)
        tensors = packed_tensors(tensors, slices)
    needed, free = total_bytes(tensors), shutil.disk_usage(aside).free
    if needed > free:
        raise CheckpointError(f"the export needs {needed / 1e9:.2f} GB and {aside.parent} has {free / 1e9:.2f} GB free")
    write_weights(aside, tensors, format)
    architecture = ARCHITECTURE if format == "hf" else "TormentedBertFrankenstein"
    meta = ("tbf", [architecture], FORMAT_VERSION, tbf.__version__)
    _write_json(aside / "config.json", {**dict(zip(CONFIG_META, meta)), **source.config.to_dict()})
    if source.tokenizer:
        from tbf.data.tokenizer import SpanishSPMTokenizer

        try:
            SpanishSPMTokenizer.from_pretrained(source.tokenizer).save_pretrained(aside)
        except DataError as error:
            raise CheckpointError(f"the tokenizer of the run cannot be copied: {error}") from None
        _load_tokenizer(aside, source.config)  # refuses one of another vocabulary
    if format == "hf":
        write_hf_files(aside, source)
    return {**facts, "weight_bytes": needed}


def _provenance(
    source: ExportSource,
    checkpoint: DeepSpeedCheckpoint,
    format: str,
    facts: dict[str, Any],
    report: dict[str, Any] | None,
) -> dict[str, Any]:
    engine = {"zero_stage": checkpoint.stage, "world_size": checkpoint.world_size, "deepspeed": checkpoint.version}
    return {
        "tbf_version": tbf.__version__,
        "format": format,
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **facts,
        "step": checkpoint.step,
        **source.origin,
        "engine": engine,
        "verified": report,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(aside: Path, out: Path) -> None:
    """Makes the finished folder appear at `out` in one rename, after its files have reached the disk."""
    for path in [*aside.rglob("*"), aside]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if not out.exists():
        aside.rename(out)
    elif not exchange(aside, out):
        old = aside.with_name(f"{aside.name}{_REPLACED}")
        out.rename(old)
        try:
            aside.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(out.absolute().parent)


def _sweep(aside: Path, out: Path) -> None:
    """Removes what killed exports to the same place left beside it, on this machine; puts back what they had moved."""
    stem = aside.name.rpartition("-")[0]
    for leftover in aside.parent.glob(f"{glob.escape(stem)}-*"):
        pid = leftover.name.removeprefix(f"{stem}-").removesuffix(_REPLACED)
        if not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        if leftover.name.endswith(_REPLACED) and not out.exists():
            leftover.rename(out)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
