"""The weight files of an export, written as a stream: memory holds one tensor at a time, whatever the model's size.

safetensors files of more than SHARD_BYTES are cut into several, with the index that Hugging Face's loaders read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import nn
from tqdm import tqdm

from tbf.errors import CheckpointError
from tbf.export.deepspeed_files import load_file
from tbf.export.stored import StoredTensor, release

FILE_NAMES = {
    "safetensors": "model.safetensors",
    "hf": "model.safetensors",
    "torch": "pytorch_model.pt",
    "ternary": "model.ternary.safetensors",
}
"""Weight file of each export format, where one file is enough."""
SHARD_BYTES = 5_000_000_000
_INDEX = ".index.json"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(
    folder: Path, tensors: Mapping[str, StoredTensor], format: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `tensors` into `folder` in one of FILE_NAMES' formats and waits until they are on the disk."""
    path = folder / FILE_NAMES[format]
    # disable=None: no bar where nobody watches; small models are done before it would show.
    with tqdm(desc=path.name, total=total_bytes(tensors), unit="B", unit_scale=True, delay=1, disable=None) as bar:
        if path.suffix == ".pt":
            with _synced(path) as file:
                torch.save({name: _watched(tensor, bar) for name, tensor in tensors.items()}, file)
            return
        shards = _shards(tensors, shard_bytes)
        names = [path.name]
        if len(shards) > 1:
            count = len(shards)
            names = [f"{path.stem}-{number:05}-of-{count:05}{path.suffix}" for number in range(1, count + 1)]
            places = {name: file for file, shard in zip(names, shards) for name in shard}
            index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": places}
            with _synced(folder / f"{path.name}{_INDEX}") as file:
                file.write(json.dumps(index, indent=2).encode())
        for name, shard in zip(names, shards):
            with _synced(folder / name) as file:
                _write_safetensors(file, {name: tensors[name] for name in shard}, bar)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Opens the weight files of an export, memory-mapped. Raises CheckpointError if one is missing or damaged."""
    format = weight_format(folder)
    path = folder / FILE_NAMES[format]
    if path.suffix == ".pt":
        return load_file(path)
    weights: dict[str, torch.Tensor] = {}
    for file in [path] if path.is_file() else _listed_files(path.with_name(f"{path.name}{_INDEX}")):
        weights |= _read_safetensors(file)
    return weights


def weight_format(folder: Path) -> str:
    """The format of the weights in `folder`. Raises CheckpointError when there are none."""
    for format, name in FILE_NAMES.items():
        if (folder / name).is_file() or (folder / f"{name}{_INDEX}").is_file():
            return format
    raise CheckpointError(f"{folder} holds no {' or '.join(dict.fromkeys(FILE_NAMES.values()))}; export the run again")


def load_strict(model: nn.Module, weights: Mapping[str, torch.Tensor], where: Path) -> None:
    """Loads every weight and buffer, ties included. Raises CheckpointError that names the first that does not fit."""
    with_ties = {**weights, **{alias: weights[name] for alias, name in tied_names(model).items() if name in weights}}
    check_shapes(model, {name: value.shape for name, value in weights.items()}, where)
    targets = model.state_dict()
    for name, target in targets.items():
        if target.is_floating_point() != with_ties[name].is_floating_point():
            raise CheckpointError(f"{where}: '{name}' is {with_ties[name].dtype}, the model's is {target.dtype}")
    for name, target in targets.items():
        target.copy_(with_ties[name])
        release(with_ties[name])


def check_shapes(model: nn.Module, shapes: Mapping[str, torch.Size], where: Path) -> None:
    """Raises CheckpointError unless `shapes` (tied weights once) are those of the model, name by name."""
    ties = tied_names(model)
    wanted = {name: value.shape for name, value in model.state_dict().items() if name not in ties}
    cure = "the config belongs to another model or tbf version"
    for name in sorted(wanted.keys() ^ shapes.keys()):
        raise CheckpointError(f"{where}: '{name}' is {'missing' if name in wanted else 'not in the model'}; {cure}")
    for name, shape in wanted.items():
        if shape != shapes[name]:
            raise CheckpointError(f"{where}: '{name}' is {list(shapes[name])}, the model's is {list(shape)}; {cure}")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of shared weights -> the first name, under which an export stores them."""
    first: dict[int, str] = {}
    names = model.state_dict(keep_vars=True).items()
    return {name: owner for name, value in names if (owner := first.setdefault(id(value), name)) != name}


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _watched(tensor: StoredTensor, bar: tqdm) -> torch.Tensor:
    value = tensor.read()
    bar.update(tensor.nbytes)
    return value


def _shards(tensors: Mapping[str, StoredTensor], limit: int) -> list[list[str]]:
    """Names in the order of writing, cut where a file would grow beyond `limit` bytes.

    Wide types come first, so that every tensor starts at a multiple of its element size.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        size += tensors[name].nbytes
        if size > limit and shards[-1]:
            shards.append([])
            size = tensors[name].nbytes
        shards[-1].append(name)
    return shards


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, StoredTensor], bar: tqdm) -> None:
    """The format: header length (8 bytes, little endian), JSON header padded with blanks, then the raw tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        values = tensor.read().reshape(-1)
        file.write(memoryview(values.view(torch.uint8).numpy()))
        bar.update(values.nbytes)


def _listed_files(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is damaged; export the run again") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names '{name[:80]}', which is not a file beside it; copy the whole folder")
    return [index.parent / name for name in names]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_safetensors

    try:
        return load_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}); export the run again") from None


def total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
