"""The hub cannot be reached in tests: a local folder and the hub's own cache layout stand for it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbf.data import hub
from tbf.data.readers import read_part
from tbf.data.sharding import prepare
from tbf.data.sources import Problems, list_source, open_source
from tbf.errors import DataError

from .conftest import OPTIONS

pytest.importorskip("datasets")
ROOT = Path(__file__).resolve().parents[2]


def write_repository(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True)
    half = len(texts) // 2
    for number, part in enumerate((texts[:half], texts[half:])):
        table = pa.table({"text": part, "n": list(range(len(part)))})
        pq.write_table(table, folder / f"train-0000{number}-of-00002.parquet", row_group_size=20)
    pq.write_table(pa.table({"text": ["solo de prueba"], "n": [0]}), folder / "test-00000-of-00001.parquet")


@pytest.fixture
def local(tmp_path, texts):
    write_repository(tmp_path / "repo" / "data", texts[:100])
    return tmp_path / "repo"


@pytest.fixture
def cached(tmp_path, texts, monkeypatch):
    """A snapshot as the hub client lays it out, and no network."""
    import huggingface_hub

    root = tmp_path / "hub"
    repository = root / "datasets--acme--spanish"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    write_repository(repository / "snapshots" / "abc123" / "data", texts[:100])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return root


def test_parse():
    assert hub.parse_hub("hf:a/b", "text") == ("a/b", "train", "text")
    assert hub.parse_hub("hf:a/b:test", "text") == ("a/b", "test", "text")
    assert hub.parse_hub("hf:a/b::body", "text") == ("a/b", "train", "body")
    for wrong in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(DataError, match="hf:NAME"):
            hub.parse_hub(wrong, "text")


def test_streams_in_the_order_of_datasets(local, texts):
    import datasets

    stream = datasets.load_dataset(str(local), split="train", streaming=True)
    assert list(open_source(f"hf:{local}")) == [row["text"] for row in stream] == texts[:100]
    assert list(open_source(f"hf:{local}:test:text")) == ["solo de prueba"]


def test_parts_cover_the_dataset_once(local, texts):
    source = list_source(f"hf:{local}")
    assert len(source.parts) >= 2
    problems = Problems()
    parts = [list(read_part(part, problems)) for part in source.parts]
    assert list(itertools.chain(*parts)) == texts[:100]


def test_offline_snapshot(cached, texts, caplog):
    assert list(open_source("hf:acme/spanish")) == texts[:100]
    assert "reading the copy in" in caplog.text
    with pytest.raises(DataError, match="no copy in the hub cache"):
        list(open_source("hf:acme/other"))


def test_without_a_network_the_copy_is_read(cached, texts, monkeypatch, caplog):
    """Name resolution fails, as on a machine without a network that was not told to stay offline."""
    import huggingface_hub

    class ConnectError(Exception):
        __module__ = "httpx2"  # whatever the client's HTTP library raises is no OSError

    def fail(*_, **__):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    assert list(open_source("hf:acme/spanish")) == texts[:100]
    assert "the hub cannot be reached: ConnectError" in caplog.text


def test_the_hub_is_reached_from_a_fresh_process(cached, tmp_path, tokenizer):
    """As a command does it, where nothing has imported the hub's client before."""
    tokenizer.save_pretrained(tmp_path / "tok")
    arguments = ["data", "prepare", "hf:acme/spanish", "--tokenizer", tmp_path / "tok", "--out", tmp_path / "p"]
    command = [sys.executable, "-m", "tbf.cli", *map(str, arguments), "--min-spanish", "0", "--min-chars", "1"]
    env = {**os.environ, "HF_HUB_CACHE": str(cached), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reading the copy in") == 1
    assert "100 documents" in done.stdout


def test_bad_split_and_column(local):
    with pytest.raises(DataError, match="nosplit"):
        list_source(f"hf:{local}:nosplit")
    with pytest.raises(DataError, match=r"no column 'body' \(columns: text, n\)"):
        list_source(f"hf:{local}:train:body")
    problems = Problems()
    assert list(open_source(f"hf:{local}:train:n", problems=problems)) == []
    assert problems.records == {"wrong_type": 100}


def test_prepared_in_parallel_like_any_source(tmp_path, local, texts, tokenizer):
    from dataclasses import replace

    result = prepare(f"hf:{local}", tokenizer, tmp_path / "p", replace(OPTIONS, processes=2))
    assert result.documents == 100
    assert result.text_bytes == sum(len(t.encode()) for t in texts[:100])


def test_a_broken_connection_is_taken_up_where_it_broke(local, texts, monkeypatch):
    class Flaky:
        """A stream that breaks after a few rows, twice."""

        failures, after = 2, 7

        def __init__(self, stream):
            self._stream = stream

        def __getattr__(self, name):
            return getattr(self._stream, name)

        def shard(self, **options):
            return Flaky(self._stream.shard(**options))

        def select_columns(self, names):
            return Flaky(self._stream.select_columns(names))

        def skip(self, count):
            for number, row in enumerate(self._stream.skip(count)):
                if number == Flaky.after and Flaky.failures:
                    Flaky.failures -= 1
                    raise ConnectionError("the line is dead")
                yield row

    source = list_source(f"hf:{local}")
    original, waits = hub._stream, []
    monkeypatch.setattr(hub, "_stream", lambda *arguments: Flaky(original(*arguments)))
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    problems = Problems()
    assert list(itertools.chain(*(read_part(part, problems) for part in source.parts))) == texts[:100]
    assert waits == [1, 1]  # each time some rows had come through
    Flaky.failures, Flaky.after = 10**6, 0
    with pytest.raises(DataError, match="after 6 tries"):
        list(read_part(source.parts[0], problems))


def test_a_dataset_that_changed_is_noticed(local, texts):
    source = list_source(f"hf:{local}")
    pq.write_table(
        pa.table({"text": texts[:50], "n": list(range(50))}), local / "data" / "train-00002-of-00003.parquet"
    )
    with pytest.raises(DataError, match="when listed"):
        list(read_part(source.parts[0], Problems()))
