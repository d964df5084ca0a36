from __future__ import annotations

import pytest

from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.model.encoder import TormentedBertFrankenstein
from tests.export.tiny_runs import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def pair() -> tuple[TormentedBertFrankenstein, SpanishSPMTokenizer]:
    """A tiny untrained model and its tokenizer."""
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer), tokenizer
