"""`tbf embed`: one vector per text."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbf.commands import add_verb
from tbf.commands.exports import FAST_HELP
from tbf.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

EXAMPLES = """\
  tbf embed exported "Hola, mundo." "Adiós." --out vectors.npy
  tbf embed exported --file sentences.txt --out vectors.npy --normalize
  tbf embed exported --file reviews.jsonl --column body --out vectors.jsonl
  cut -f2 table.tsv | tbf embed exported > vectors.jsonl
"""
SUFFIXES = (".npy", ".jsonl")


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "embed", run, summary="turn texts into vectors", examples=EXAMPLES,
        about="Texts are arguments, the lines of a file, or the lines of standard input; row i belongs to text i.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="DIR", help="an export: `export/` of a run, or what convert_ckpt.py wrote")
    add("texts", metavar="TEXT", nargs="*", help="texts; without any, and without --file, standard input is read")
    add("--file", type=Path, metavar="FILE", help="UTF-8 text with one text per line, or .jsonl")
    add("--column", default="text", metavar="KEY", help="key of the text in a .jsonl file (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help=".npy (float32, texts x width) or .jsonl; default: jsonl on stdout")
    add("--force", action="store_true", help="replace --out if it exists")
    add("--normalize", action="store_true", help="unit length, so that dot products are cosines")
    add("--batch-size", type=int, default=32, metavar="N", help="texts per batch (default: %(default)s)")
    add("--max-length", type=int, metavar="N", help="cut texts to N tokens (default: as in training, else 512)")
    add("--fast", action="store_true", help=FAST_HELP)


def run(arguments: argparse.Namespace) -> int:
    out: Path | None = arguments.out
    if out and out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: choose a name that ends in {' or '.join(SUFFIXES)}")
    if out and out.exists() and not arguments.force:
        raise ConfigError(f"--out {out} exists; pass --force to replace it, or choose another name")
    texts = read_texts(arguments.texts, arguments.file, arguments.column)
    from tbf.commands.exports import load_with_tokenizer, training_length
    from tbf.evaluate.embeddings import embed

    model, tokenizer = load_with_tokenizer(arguments.model, fast=arguments.fast)
    vectors = embed(
        model,
        tokenizer,
        texts,
        batch_size=arguments.batch_size,
        max_length=training_length(Path(arguments.model)) if arguments.max_length is None else arguments.max_length,
        normalize=arguments.normalize,
        progress=True,
    )
    if out is None:
        _write_jsonl(sys.stdout, texts, vectors)
    else:
        _write_file(out, texts, vectors)
        print(f"{out}: {len(vectors)} vectors of {vectors.shape[1]} numbers", file=sys.stderr)
    return 0


def read_texts(given: list[str], file: Path | None, column: str) -> list[str]:
    """Texts from the command line, a file or standard input. Raises DataError that names the line at fault."""
    if given and file:
        raise ConfigError("give texts or --file, not both")
    if given:
        return given
    if file is None:
        if sys.stdin.isatty():
            print("reading texts from the terminal, one per line; Ctrl-D ends", file=sys.stderr)
        content, name = sys.stdin.buffer.read(), "standard input"
    else:
        try:
            content, name = file.read_bytes(), str(file)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}; check the path") from None
    lines = [_decode(line, name, number) for number, line in enumerate(content.split(b"\n"), start=1)]
    if lines and not lines[-1]:  # what follows the last line end
        lines.pop()
    if not any(line.strip() for line in lines):
        raise DataError(f"{name} is empty; give one text per line")
    if file is not None and file.suffix == ".jsonl":
        return [_record(line, name, number, column) for number, line in enumerate(lines, start=1)]
    return lines


def _decode(line: bytes, name: str, number: int) -> str:
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); "
            "convert it, e.g. with iconv -f latin1 -t utf-8"
        ) from None


def _record(line: str, name: str, number: int, column: str) -> str:
    try:
        value = json.loads(line)[column]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{name}, line {number}: no JSON object with the key '{column}'; name it with --column"
        ) from None
    if not isinstance(value, str):
        raise DataError(f"{name}, line {number}: '{column}' is {value!r:.60}, not a text")
    return value


def _write_file(out: Path, texts: list[str], vectors: np.ndarray) -> None:
    """Writes aside and renames, so that `out` is whole or absent."""
    import numpy as np

    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        if out.suffix == ".npy":
            with aside.open("wb") as file:
                np.save(file, vectors)
        else:
            with aside.open("w", encoding="utf-8") as lines:
                _write_jsonl(lines, texts, vectors)
        aside.replace(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    finally:
        aside.unlink(missing_ok=True)


def _write_jsonl(file: Any, texts: list[str], vectors: np.ndarray) -> None:
    for text, vector in zip(texts, vectors):
        numbers = [float(f"{value:.9g}") for value in vector]
        file.write(json.dumps({"text": text, "embedding": numbers}, ensure_ascii=False) + "\n")
