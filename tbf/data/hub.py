"""Streams datasets of the Hugging Face hub, `hf:NAME[:split[:column]]`, with `datasets`; never downloads one whole.

Offline (HF_HUB_OFFLINE=1), or when the hub cannot be reached, the copy in the local hub cache is read in the same way.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tbf.data.sources import HUB_PART_BYTES, Part, Problems, ReadOptions, Source
from tbf.errors import DataError

log = logging.getLogger(__name__)

ATTEMPTS = 6
"""Tries without any progress when the network fails; the waits double from one second."""
_HTTP_LIBRARIES = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp")
_ENOUGH_PARTS = 16  # with fewer files, parts are groups of rows where the format allows it


def parse_hub(spec: str, column: str) -> tuple[str, str, str]:
    """(name, split, column) of `hf:NAME[:split[:column]]`."""
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{spec}: write hf:NAME[:split[:column]], e.g. hf:erickfmm/red_pajama_es_hq_35:train:text")
    split = rest[0] if rest and rest[0] else "train"
    return name, split, rest[1] if len(rest) == 2 and rest[1] else column


def list_hub(spec: str, options: ReadOptions) -> Source:
    """Lists the parts of a hub dataset (its files, or groups of rows when they are few).

    Raises:
        DataError: no such dataset, split or column, or neither the hub nor a local copy can be reached.
    """
    name, split, column = parse_hub(spec, options.column)
    path, revision = _resolve(name, spec)
    stream = _stream(path, revision, split, spec)
    names = list(stream.features or next(iter(stream), {}))
    if not names:
        raise DataError(f"{spec}: the split has no rows; name another one")
    if column not in names:
        raise DataError(f"{spec}: no column {column!r} (columns: {', '.join(names)}); write hf:{name}:{split}:COLUMN")
    count = stream.num_shards
    info = (stream.info.splits or {}).get(split)
    size = (info.num_bytes // count if info and info.num_bytes else 0) or HUB_PART_BYTES
    # `end` holds the number of parts: a dataset that has changed under us is noticed when it is read.
    parts = [Part("hf", path, i, count, size, count == 1, column, split=split, revision=revision) for i in range(count)]
    return Source(spec, tuple(parts), {"hub": name, "revision": revision, "split": split, "column": column})


def _resolve(name: str, spec: str) -> tuple[str, str]:
    """(what `load_dataset` takes, revision): the hub's newest commit, or the folder of a local copy and its name."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if Path(name).is_dir():
        files = sorted(file for file in Path(name).rglob("*") if file.is_file())
        return name, " ".join(f"{file.relative_to(name)}:{file.stat().st_size}" for file in files)
    reason = "offline mode"
    if not constants.HF_HUB_OFFLINE and os.environ.get("HF_DATASETS_OFFLINE", "0") in ("0", ""):
        try:
            return name, huggingface_hub.HfApi().dataset_info(name).sha or ""
        except errors.RepositoryNotFoundError:
            raise DataError(
                f"{spec}: the hub has no such dataset, or it is private; check the name, or log in with `hf auth login`"
            ) from None
        except Exception as error:
            if not _is_network_error(error):
                raise
            reason = f"the hub cannot be reached: {type(error).__name__}"
    try:
        folder = huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError):
        raise DataError(
            f"{spec}: no copy in the hub cache ({reason}); connect, or download it elsewhere with "
            f"`hf download {name} --repo-type dataset` and copy the cache folder, or name local files "
            "or a folder of shards made before"
        ) from None
    log.warning("%s: reading the copy in %s (%s)", spec, folder, reason)
    return folder, Path(folder).name


def _stream(path: str, revision: str, split: str, spec: str) -> Any:
    import datasets

    hub_revision = None if Path(path).is_dir() else revision
    try:
        stream = datasets.load_dataset(path, split=split, streaming=True, revision=hub_revision)
    except ValueError as error:  # an unknown split
        raise DataError(f"{spec}: {_short(error)}; write hf:NAME:SPLIT with a split that it has") from None
    except Exception as error:
        if not (isinstance(error, datasets.exceptions.DatasetsError) or _is_network_error(error)):
            raise
        raise DataError(f"{spec}: cannot be opened ({_short(error)}); check the name and the connection") from None
    if stream.num_shards < _ENOUGH_PARTS and hasattr(stream, "reshard"):
        stream = stream.reshard()
    return stream


def _is_network_error(error: Exception) -> bool:
    """The hub's client has changed its HTTP library more than once, and each raises errors of its own."""
    return isinstance(error, OSError) or type(error).__module__.startswith(_HTTP_LIBRARIES)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_hub_part(part: Part, problems: Problems) -> Iterator[str]:
    """Yields the documents of one part; a broken connection is taken up again where it broke.

    Raises:
        DataError: the network stays away, or the dataset is not the one that was listed.
    """
    spec = f"hf:{part.path}:{part.split}"
    done = attempt = 0
    while True:
        before = done
        try:
            stream = _stream(part.path, part.revision, part.split, spec)
            if stream.num_shards != part.end:
                raise DataError(f"{spec}: has {stream.num_shards} parts, {part.end} when listed; delete the shards "
                                "of the old version and prepare the data again")  # fmt: skip
            rows = stream.shard(num_shards=part.end, index=part.start).select_columns([part.column])
            for row in rows.skip(done):
                done += 1
                value = row[part.column]
                if isinstance(value, str):
                    yield value
                else:
                    problems.record("null" if value is None else "wrong_type")
            return
        except Exception as error:
            if not _is_network_error(error):
                raise
            attempt = 1 if done > before else attempt + 1
            if attempt == ATTEMPTS:
                raise DataError(
                    f"{spec}: part {part.start} cannot be read after {ATTEMPTS} tries ({_short(error)}); "
                    "run the same command again: it goes on where it stopped"
                ) from error
            time.sleep(2 ** (attempt - 1))
