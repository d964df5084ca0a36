"""The verbs of `tbf`, one module each. Importing them is quick: what a verb needs is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Run = Callable[[argparse.Namespace], int]


def add_verb(
    verbs: Any, name: str, run: Run | None, *, summary: str, examples: str, about: str = ""
) -> argparse.ArgumentParser:
    """Adds a verb (`verbs` is argparse's group of them) and returns its parser; `run` does the work, if it does any."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {about}".rstrip(),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run:
        parser.set_defaults(run=run)
    return parser


def add_verbs(parser: argparse.ArgumentParser) -> Any:
    """Gives a parser its group of verbs; one of them must be chosen."""
    return parser.add_subparsers(dest="_verb", metavar="VERB", required=True, title="verbs")
