"""A tokenizer, texts and prepared folders that the data tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tbf.data.cleaning import CleanOptions
from tbf.data.sharding import PrepareOptions, prepare
from tbf.data.sources import open_source
from tbf.data.tokenizer import SpanishSPMTokenizer

OPTIONS = PrepareOptions(clean=CleanOptions(min_chars=1, min_spanish=0), shard_bytes=40_000, progress=False)


@pytest.fixture(autouse=True)
def no_influence_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some machines keep /tmp in memory, where a cache would only hold copies; others have a full cache."""
    monkeypatch.setattr("tbf.data.prepare.is_ram_disk", lambda path: False)
    monkeypatch.setattr("tbf.data.prepare.cache_root", lambda: tmp_path / "default-cache")


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    return list(open_source("sample"))


@pytest.fixture(scope="session")
def tokenizer(sample_texts: list[str]) -> SpanishSPMTokenizer:
    return SpanishSPMTokenizer.train(sample_texts, 1200)


def spanish_texts(words: list[str], documents: int, seed: int = 0) -> list[str]:
    """Different documents of 1 to 400 words, drawn from a list of words."""
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(0, len(words), generator.integers(1, 400)) for _ in range(documents)]
    return [" ".join(words[w] for w in document) + f" {i}" for i, document in enumerate(drawn)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(sample_texts: list[str]) -> list[str]:
    return spanish_texts(" ".join(sample_texts[:20]).split(), 300)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A .jsonl file of 300 documents, about 350 KB."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: SpanishSPMTokenizer) -> Path:
    """The corpus prepared as about ten shards. Tests must not change it."""
    folder = tmp_path_factory.mktemp("shards") / "prepared"
    prepare(str(corpus), tokenizer, folder, OPTIONS)
    return folder
