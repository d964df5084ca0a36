from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tbf.data.loader import PackedDataset
from tbf.data.prepare import prepare_data
from tbf.data.sharding import prepare
from tbf.errors import DataError

from .conftest import OPTIONS, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Section:
    source: str = "sample"
    seq_len: int = 128
    validation_share: float = 0.1
    column: str = "text"
    documents: str = "file"
    min_chars: int = 1
    min_spanish: float = 0.0
    num_workers: int = 1
    disk_budget_gb: float = 1.0


def test_sample_end_to_end_and_reuse(tmp_path):
    folder, tokenizer = prepare_data(Section(), None, tmp_path, vocab_size=800, progress=False)
    assert tokenizer.vocab_size == 800
    train, held = (
        PackedDataset(folder, seq_len=128, split=s, validation_share=0.1, tokenizer=tokenizer)
        for s in ("train", "validation")
    )
    assert train.rows_per_epoch > 100
    assert 0.03 < held.rows_per_epoch / train.rows_per_epoch < 0.3
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"}
    again = prepare_data(Section(), None, tmp_path, vocab_size=800, progress=False)
    assert (again[0], again[1].fingerprint) == (folder, tokenizer.fingerprint)
    changed = {f.name for f, t in files.items() if f.stat().st_mtime_ns != t}
    assert changed <= {"plan.json", "index.json", "tokenizer.model", "tokenizer_config.json"}


def test_other_content_gets_another_folder(tmp_path, tokenizer, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts[:40])
    section = Section(source=str(path))
    first, _ = prepare_data(section, tokenizer, tmp_path / "cache", vocab_size=0, progress=False)
    write_jsonl(path, texts[:41])
    second, _ = prepare_data(section, tokenizer, tmp_path / "cache", vocab_size=0, progress=False)
    assert first != second
    assert PackedDataset(first, seq_len=128).index.documents == 40
    assert PackedDataset(second, seq_len=128).index.documents == 41


def test_another_share_or_row_length_reuses_the_shards(tmp_path, tokenizer, texts):
    section = Section(source=str(write_jsonl(tmp_path / "a.jsonl", texts[:100])))
    first, _ = prepare_data(section, tokenizer, tmp_path / "cache", vocab_size=0, progress=False)
    small = PackedDataset(first, seq_len=128, split="validation", validation_share=0.1).rows_per_epoch
    other = replace(section, validation_share=0.4, seq_len=64)
    second, _ = prepare_data(other, tokenizer, tmp_path / "cache", vocab_size=0, progress=False)
    assert first == second
    assert PackedDataset(second, seq_len=128, split="validation", validation_share=0.4).rows_per_epoch > 2 * small


def test_the_section_says_how_text_is_read_and_cleaned(tmp_path, tokenizer, texts):
    path = write_jsonl(
        tmp_path / "a.jsonl", [*texts[:40], "The cat and the dog were at the house of an old man."], "body"
    )
    section = Section(source=str(path), column="body")
    for changes, documents in (({}, 41), ({"min_spanish": 0.3}, 40), ({"min_chars": 10**6}, None)):
        prepared = replace(section, **changes), tokenizer, tmp_path / "cache"
        if documents is None:
            with pytest.raises(DataError, match="too_short"):
                prepare_data(*prepared, vocab_size=0, progress=False)
        else:
            folder, _ = prepare_data(*prepared, vocab_size=0, progress=False)
            assert PackedDataset(folder, seq_len=64).index.documents == documents


def test_a_prepared_folder_is_a_source(tmp_path, corpus, tokenizer):
    prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)
    folder, found = prepare_data(
        Section(source=str(tmp_path / "p")), None, tmp_path / "c", vocab_size=9, progress=False
    )
    assert folder == tmp_path / "p"
    assert found.fingerprint == tokenizer.fingerprint
    assert not (tmp_path / "c").exists()


def test_damage_is_found_on_the_next_start(tmp_path, tokenizer, texts, capsys):
    section = Section(source=str(write_jsonl(tmp_path / "a.jsonl", texts[:40])))
    folder, _ = prepare_data(section, tokenizer, tmp_path / "cache", vocab_size=0, progress=False)
    path = folder / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00000\.bin: damaged .*delete shard-00000"):
        prepare_data(section, tokenizer, tmp_path / "cache", vocab_size=0)
    for file in folder.glob("shard-00000.*"):
        file.unlink()
    assert prepare_data(section, tokenizer, tmp_path / "cache", vocab_size=0)[0] == folder


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b"\n\n", "no text in it"),
        ("latin.txt", "La canción del año".encode("latin-1"), "not UTF-8"),
        ("k.jsonl", b'{"body": "hola"}\n', "no line has the key 'text'"),
        ("p.parquet", b"nothing", "not a readable parquet"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_bad_sources_name_file_and_cure(tmp_path, tokenizer, name, data, message, given):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        prepare_data(
            Section(source=str(tmp_path / name)),
            tokenizer if given else None,
            tmp_path / "c",
            vocab_size=500,
            progress=False,
        )
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_processes_at_once(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts)
    program = f"""
from tests.data.test_prepare import Section
from tbf.data.prepare import prepare_data
section = Section(source={str(tmp_path / "a.jsonl")!r})
folder, tokenizer = prepare_data(section, None, {str(tmp_path / "cache")!r}, vocab_size=900)
print(folder, tokenizer.fingerprint)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1


def test_a_lock_says_who_holds_it(tmp_path):
    from tbf.data.files import folder_lock

    program = f"""
from pathlib import Path
from tbf.data.files import folder_lock
with folder_lock(Path({str(tmp_path)!r}), "preparing data"):
    print("got it")
"""
    with folder_lock(tmp_path, "preparing data"):
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "is preparing data in" in process.stderr.readline()
        assert process.poll() is None
    assert process.communicate(timeout=30)[0] == "got it\n"
