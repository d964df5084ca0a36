"""`tbf report`: one HTML page about a run."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tbf.commands import add_verb
from tbf.errors import CheckpointError, ConfigError

EXAMPLES = """\
  tbf report runs/mini-1
  tbf report runs/mini-1 --out mini.html --sample "El [MASK] ladra." --sample "Madrid es una [MASK]."
  tbf report runs/es-2048 --no-samples
"""
SAMPLES = (
    "La capital de España es [MASK].",
    "El perro [MASK] en la calle.",
    "Hoy hace mucho [MASK] y no quiero salir.",
    "La ley entrará en [MASK] al día siguiente de su publicación.",
    "Dijo que no [MASK] nada del asunto.",
    "Una vez al [MASK] van todos juntos al mercado.",
)


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "report", run, summary="write one HTML page about a run", examples=EXAMPLES,
        about="Curves, the results of `tbf eval` and `tbf finetune` on the run's export, and filled masks, in one file "
        "that needs no network.",
    )  # fmt: skip
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN", help="run folder, finished or not")
    add("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html, replaced if it is there)")
    add("--force", action="store_true", help="replace --out if it exists")
    add("--sample", action="append", metavar="TEXT", help="text with [MASK] to fill (repeatable; default: six of ours)")
    add("--no-samples", action="store_true", help="don't load the export to fill masks")


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out or arguments.run_dir / "report.html"
    if arguments.out and out.exists() and not arguments.force:
        raise ConfigError(f"--out {out} exists; pass --force to replace it, or choose another name")
    if arguments.no_samples and arguments.sample:
        raise ConfigError("--sample and --no-samples exclude each other; give one of them")
    from tbf.report.history import read_history
    from tbf.report.page import render

    history = read_history(arguments.run_dir)
    samples = []
    if history.export and not arguments.no_samples:
        samples = fill(history.export, arguments.sample or SAMPLES)
    elif not arguments.no_samples:
        print(f"no export in {history.folder} yet: the page shows no filled masks", file=sys.stderr)
    page = render(history, samples)
    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    print(f"{out}: {len(page) / 1e3:,.0f} kB")
    return 0


def fill(export: Path, texts: Any) -> list[Any]:
    """(text, candidates of each of its masks)."""
    from tbf.commands.exports import load_with_tokenizer
    from tbf.evaluate.fill_mask import fill_mask

    model, tokenizer = load_with_tokenizer(str(export))
    return [(text, fill_mask(model, tokenizer, text)) for text in texts]
