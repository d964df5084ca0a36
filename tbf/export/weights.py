"""The weight file of an export, written as a stream: memory holds one tensor at a time, whatever the model's size."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import nn
from tqdm import tqdm

from tbf.errors import CheckpointError
from tbf.export.deepspeed_files import StoredTensor, load_file

FILE_NAMES = {"safetensors": "model.safetensors", "torch": "pytorch_model.pt"}
"""Weight file of each export format."""

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


def write_weights(folder: Path, tensors: Mapping[str, StoredTensor], format: str) -> Path:
    """Writes `tensors` into `folder` in one of FILE_NAMES' formats and waits until the file is on the disk."""
    path = folder / FILE_NAMES[format]
    with (
        path.open("wb") as file,
        # disable=None: no bar where nobody watches; small models are done before it would show.
        tqdm(desc=path.name, total=_total_bytes(tensors), unit="B", unit_scale=True, delay=1, disable=None) as bar,
    ):
        if format == "safetensors":
            _write_safetensors(file, tensors, bar)
        else:
            content = {}
            for name, tensor in tensors.items():
                content[name] = tensor.read()
                bar.update(tensor.nbytes)
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return path


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Opens the weight file of an export, memory-mapped. Raises CheckpointError if it is missing or damaged."""
    path = next((folder / name for name in FILE_NAMES.values() if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no {' or '.join(FILE_NAMES.values())}; export the run again")
    if path.suffix == ".pt":
        return load_file(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_safetensors

    try:
        return load_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}); export the run again") from None


def load_strict(model: nn.Module, weights: Mapping[str, torch.Tensor], where: Path) -> None:
    """Loads every weight and buffer, ties included. Raises CheckpointError that names the first that does not fit."""
    with_ties = {**weights, **{alias: weights[name] for alias, name in tied_names(model).items() if name in weights}}
    check_shapes(model, {name: value.shape for name, value in weights.items()}, where)
    model.load_state_dict(with_ties, strict=True)


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


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, StoredTensor], bar: tqdm) -> None:
    """The format: header length (8 bytes, little endian), JSON header padded with blanks, then the raw tensors.

    Wide types come first, so that every tensor starts at a multiple of its element size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        dtype = _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        values = tensors[name].read().reshape(-1)
        file.write(memoryview(values.view(torch.uint8).numpy()))
        bar.update(values.nbytes)


def _total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
