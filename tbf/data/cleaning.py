"""Light cleaning, each part switchable and counted.

Nothing is dropped silently: every document that enters leaves as documents, or as one count under the name of the rule
that refused it. A long document is cut, never thrown away.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from tbf.data.spanish import spanish_score
from tbf.errors import ConfigError

# Control characters except tab and newline, byte order marks, bidirectional marks, replacement characters of nothing.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_BREAKS = ("\n\n", "\n", " ")  # where a long document may be cut, best first


@dataclass(frozen=True)
class CleanOptions:
    """What the cleaner does; 0 or False switches a rule off."""

    nfc: bool = True
    """Compose accents (NFC)."""
    control: bool = True
    """Remove control characters and fold line ends to newlines."""
    min_chars: int = 20
    """Shorter documents are dropped (`too_short`)."""
    max_chars: int = 100_000
    """Longer documents are cut at a paragraph, line or space (`split`)."""
    min_spanish: float = 0.65
    """Documents that score less are dropped (`not_spanish`); see `tbf.data.spanish`."""
    duplicates: bool = True
    """Drop exact repetitions (`duplicate`)."""

    def __post_init__(self) -> None:
        if self.max_chars and self.max_chars < 1000:
            raise ConfigError(f"max_chars={self.max_chars} cuts sentences; use 0 (never cut) or at least 1000")
        if not 0.0 <= self.min_spanish <= 1.0:
            raise ConfigError(f"min_spanish={self.min_spanish} is no share; use 0 (off) to 1, e.g. 0.65")


def clean(text: str, options: CleanOptions, counts: Counter[str]) -> list[str]:
    """Returns the documents made of one raw document: none, one, or its pieces. Adds what happened to `counts`."""
    if options.control:
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not text.replace("\n", "").isprintable():  # quicker than the search, and most texts end here
            text, removed = _CONTROL.subn("", text)
            counts["control_removed"] += removed > 0
    if options.nfc and not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        counts["nfc_changed"] += 1
    text = text.strip()
    if not text:
        counts["empty"] += 1
        return []
    if len(text) < options.min_chars:
        counts["too_short"] += 1
        return []
    if options.min_spanish and spanish_score(text) < options.min_spanish:
        counts["not_spanish"] += 1
        return []
    if not options.max_chars or len(text) <= options.max_chars:
        return [text]
    pieces = split_long(text, options.max_chars)
    counts["split"] += 1
    counts["split_pieces"] += len(pieces)
    return pieces


def split_long(text: str, max_chars: int) -> list[str]:
    """Cuts a text into pieces of at most `max_chars`, in their second half if a paragraph, line or word ends there."""
    pieces = []
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        cut = next((at for mark in _BREAKS if (at := text.rfind(mark, start + max_chars // 2, end)) > 0), end)
        pieces.append(text[start:cut].strip())
        start = cut
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if piece]
