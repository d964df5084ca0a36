"""`tbf eval`: how well a model guesses the words of a text."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbf.commands import add_verb
from tbf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tbf.evaluate.windows import Window

EXAMPLES = """\
  tbf eval exported held-out.parquet
  tbf eval runs/mini-1/export novela.txt leyes.jsonl --max-tokens 200000 --pseudo-tokens 0
  tbf eval exported reviews.jsonl --column body --json
  zcat texto.gz | tbf eval exported - --documents line
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "eval", run, summary="score a model on text: masked-LM loss, accuracy, pseudo-perplexity",
        examples=EXAMPLES, about="Long texts are read in overlapping windows; every token is scored once.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="DIR", help="an export: `export/` of a run, or what convert_ckpt.py wrote")
    add("sources", metavar="SOURCE", nargs="+", help="file, folder, glob of parquet, jsonl or txt; sample; - for stdin")
    add("--column", default="text", metavar="KEY", help="column of parquet, key of jsonl (default: %(default)s)")
    add("--documents", choices=("file", "line", "block"), default="file", help="what a document of a .txt file is")
    add("--max-length", type=int, metavar="N", help="tokens of a window (default: as in training, else 512)")
    add("--stride", type=int, default=0, metavar="N", help="tokens between windows (default: 3/4 of a window)")
    add("--mask-rate", type=float, default=0.15, metavar="X", help="share of the tokens hidden (default: %(default)s)")
    add("--pseudo-tokens", type=int, default=1000, metavar="N",
        help="tokens drawn for the pseudo-perplexity, each hidden alone; 0: none (default: %(default)s)")  # fmt: skip
    add("--max-tokens", type=int, metavar="N", help="stop reading after so many tokens (default: read all)")
    add("--batch-size", type=int, default=32, metavar="N", help="windows of a batch (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the masks (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object instead of a table")
    add("--out", type=Path, metavar="FILE", help="where the result goes (default: DIR/evaluation/text-SOURCE.json)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.pseudo_tokens < 0 or (arguments.max_tokens is not None and arguments.max_tokens < 1):
        raise ConfigError("--pseudo-tokens must be 0 or more and --max-tokens at least 1")
    if not 0.0 < arguments.mask_rate < 1.0:
        raise ConfigError(f"--mask-rate {arguments.mask_rate:g} must lie between 0 and 1, e.g. 0.15")
    from tbf.commands.exports import load_with_tokenizer, training_length
    from tbf.evaluate.mlm import masked_lm, pseudo_likelihood
    from tbf.evaluate.results import check_writable, result_path, save_result
    from tbf.evaluate.windows import cut

    model, tokenizer = load_with_tokenizer(arguments.model)
    export = Path(arguments.model)
    name = "stdin" if arguments.sources == ["-"] else Path(arguments.sources[0]).stem or "text"
    out = check_writable(arguments.out or result_path(export, f"text-{name}"))
    length = training_length(export) if arguments.max_length is None else arguments.max_length
    counted = _Counted(read_documents(arguments.sources, arguments.column, arguments.documents))
    windows = list(_until(cut(tokenizer, counted, length, arguments.stride), arguments.max_tokens))
    if not windows:
        raise DataError(f"{' '.join(arguments.sources)}: there is no text to score; give some")
    options = {"seed": arguments.seed, "batch_size": arguments.batch_size, "progress": True}
    started = time.perf_counter()
    result: dict[str, Any] = {
        "kind": "text",
        "sources": arguments.sources,
        "texts": counted.seen,
        "tokens": sum(window.end - window.first for window in windows),
        "windows": len(windows),
        "window_tokens": length,
        "mask_rate": arguments.mask_rate,
        "seed": arguments.seed,
        **masked_lm(model, tokenizer, windows, rate=arguments.mask_rate, **options),
    }
    if arguments.pseudo_tokens:
        result |= pseudo_likelihood(model, tokenizer, windows, tokens=arguments.pseudo_tokens, **options)
    result["seconds"] = round(time.perf_counter() - started, 2)
    save_result(out, result)
    print(json.dumps(result, ensure_ascii=False) if arguments.json else format_scores(result))
    print(f"written to {out}", file=sys.stderr)
    return 0


def read_documents(sources: list[str], column: str, documents: str) -> Iterator[str]:
    """The texts of all sources, in order. Raises DataError for what cannot be read, before anything is scored."""
    from tbf.data.sources import ReadOptions, open_source

    options = ReadOptions(column=column, documents=documents)
    for source in sources:
        yield from _standard_input(documents) if source == "-" else open_source(source, options)


def _standard_input(documents: str) -> Iterator[str]:
    content = sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}); "
            "convert it, e.g. with iconv -f latin1 -t utf-8"
        ) from None
    parts = {"file": [text], "line": text.splitlines(), "block": re.split(r"\n\s*\n", text)}[documents]
    yield from (part for part in parts if part.strip())


class _Counted:
    """An iterable that knows how many items went through it."""

    def __init__(self, items: Iterator[str]) -> None:
        self._items, self.seen = items, 0

    def __iter__(self) -> Iterator[str]:
        for item in self._items:
            self.seen += 1
            yield item


def _until(windows: Iterator[Window], tokens: int | None) -> Iterator[Window]:
    """Windows up to about `tokens` scored tokens."""
    total = 0
    for window in windows:
        yield window
        total += window.end - window.first
        if tokens is not None and total >= tokens:
            return


def format_scores(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['texts']:,} texts, {result['tokens']:,} tokens in {result['windows']:,} windows of up to "
        f"{result['window_tokens']} tokens",
        f"{'':18}{'hidden':>9}{'loss (nats)':>13}{'accuracy':>10}",
    ]
    rows = {"all": result, **result["by_class"]}
    for name, row in rows.items():
        lines.append(f"{name:18}{row['masked_tokens']:>9,}{row['loss']:>13.4f}{row['masked_accuracy']:>10.1%}")
    if "pseudo_perplexity" in result:
        lines.append(
            f"pseudo-perplexity {result['pseudo_perplexity']:,.1f} ± {result['pseudo_perplexity_error']:,.1f} "
            f"({result['pseudo_tokens']:,} tokens, each hidden alone)"
        )
    return "\n".join(lines)
