"""What the verbs that use an export share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tbf.errors import CheckpointError

if TYPE_CHECKING:
    from tbf.data.tokenizer import SpanishSPMTokenizer
    from tbf.model.encoder import TormentedBertFrankenstein


FAST_HELP = "for packed exports on processors with AVX512-VNNI: compiled code, several times as fast, rounded otherwise"


def load_with_tokenizer(folder: str, *, fast: bool = False) -> tuple[TormentedBertFrankenstein, SpanishSPMTokenizer]:
    """Loads an export that can read text. Raises CheckpointError when it has no tokenizer."""
    from tbf.export.plain import load_pretrained

    model, tokenizer = load_pretrained(folder, fast=fast)
    if tokenizer is None:
        raise CheckpointError(f"{folder} was exported without a tokenizer; export it again with --tokenizer")
    return model, tokenizer


def training_length(export: Path) -> int:
    """Tokens per row that the model was trained on, or what embeddings take when nobody knows."""
    from tbf.evaluate.embeddings import MAX_LENGTH

    try:
        return int(json.loads((export / "export.json").read_text(encoding="utf-8"))["data"]["seq_len"])
    except (OSError, ValueError, KeyError, TypeError):
        return MAX_LENGTH
