from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tbf.data.cleaning import CleanOptions
from tbf.data.duplicates import mark_duplicates
from tbf.data.loader import PackedDataset
from tbf.data.plan import PrepareOptions, parse_share, parse_sources
from tbf.data.sharding import prepare, verify
from tbf.data.shards import FlatFile, ShardIndex, ShardInfo, read_documents, token_dtype
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError

from .conftest import OPTIONS, spanish_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


def documents(folder: Path, tokenizer: SpanishSPMTokenizer) -> list[str]:
    """Every document of a folder, decoded, in order."""
    index = ShardIndex.read(folder)
    found = []
    for info in index.shards:
        shard = FlatFile(folder / f"{info.name}.bin", index.dtype)
        offsets, _ = read_documents(folder, info)
        drop = set(index.duplicates(info).tolist())
        for i, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
            ids = shard.read(start, end - start)
            assert ids[0] == tokenizer.cls_id
            assert ids[-1] == tokenizer.sep_id
            if i not in drop:
                found.append(tokenizer.decode(ids))
        shard.close()
    return found


def test_documents_come_back(shards, texts, tokenizer):
    assert documents(shards, tokenizer) == texts
    index = ShardIndex.read(shards)
    assert len(index.shards) > 5
    assert index.complete
    assert index.documents == len(texts)
    assert index.dtype == np.dtype("<u2")
    verify(shards)
    SpanishSPMTokenizer.from_pretrained(shards / "tokenizer")
    assert not list(shards.glob(".*.tmp"))


def test_token_width():
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_bytes_do_not_depend_on_processes(tmp_path, corpus, shards, tokenizer):
    prepare(str(corpus), tokenizer, tmp_path / "p", replace(OPTIONS, processes=3))
    assert contents(tmp_path / "p") == contents(shards)


def test_a_second_call_makes_nothing(tmp_path, corpus, tokenizer):
    first = prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)
    assert first.made == first.shards > 5
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "p").glob("shard-*")}
    again = prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)
    assert again.made == 0
    assert (again.documents, again.tokens, again.counts) == (first.documents, first.tokens, first.counts)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "p").glob("shard-*")} == before


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_a_missing_or_cut_file_is_made_again(tmp_path, corpus, shards, tokenizer, suffix):
    folder = tmp_path / "p"
    prepare(str(corpus), tokenizer, folder, OPTIONS)
    path = folder / f"shard-00002.{suffix}"
    path.write_bytes(path.read_bytes()[:-9])
    (folder / f"shard-00004.{suffix}").unlink()
    assert prepare(str(corpus), tokenizer, folder, OPTIONS).made == 2
    assert contents(folder) == contents(shards)


def test_kill_9_then_resume_gives_the_same_bytes(tmp_path, tokenizer, sample_texts):
    texts = spanish_texts(" ".join(sample_texts).split(), 1500, seed=4)
    source = write_jsonl(tmp_path / "big.jsonl", texts)
    model = tokenizer.save_pretrained(tmp_path / "tok")
    program = f"""
from tests.data.conftest import OPTIONS
from dataclasses import replace
from tbf.data.sharding import prepare
from tbf.data.tokenizer import SpanishSPMTokenizer
prepare({str(source)!r}, SpanishSPMTokenizer.from_pretrained({str(model)!r}), {str(tmp_path / "p")!r},
        replace(OPTIONS, processes=2))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "p").glob("shard-*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # the parent only: its workers must not go on
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.3)
    finished = len(list((tmp_path / "p").glob("shard-*.json")))
    time.sleep(0.3)
    assert len(list((tmp_path / "p").glob("shard-*.json"))) == finished
    assert not (tmp_path / "p" / "index.json").exists()
    result = prepare(str(source), tokenizer, tmp_path / "p", OPTIONS)
    assert 0 < result.made < result.shards
    assert not list((tmp_path / "p").glob(".*.tmp"))
    prepare(str(source), tokenizer, tmp_path / "straight", OPTIONS)
    assert contents(tmp_path / "p") == contents(tmp_path / "straight")
    assert (tmp_path / "p" / "index.json").read_bytes() == (tmp_path / "straight" / "index.json").read_bytes()


def test_shares_of_the_work_add_up(tmp_path, corpus, shards, tokenizer):
    folder = tmp_path / "p"
    first = prepare(str(corpus), tokenizer, folder, replace(OPTIONS, share=(0, 2)))
    assert not first.complete
    assert "other machines" in first.note
    assert not (folder / "index.json").exists()
    assert prepare(str(corpus), tokenizer, folder, replace(OPTIONS, share=(1, 2))).complete
    assert contents(folder) == contents(shards)
    assert ShardIndex.read(folder).documents == ShardIndex.read(shards).documents
    with pytest.raises(ConfigError, match="shard 2/2"):
        PrepareOptions(share=(2, 2))


def test_duplicates_within_and_across_shards(tmp_path, tokenizer, texts):
    doubled = [texts[0], texts[1], texts[0], *texts[2:250], texts[1], *texts[5:10]]
    path = write_jsonl(tmp_path / "a.jsonl", doubled)
    folder = tmp_path / "p"
    result = prepare(str(path), tokenizer, folder, OPTIONS)
    assert documents(folder, tokenizer) == texts[:250]
    assert result.documents == 250
    index = ShardIndex.read(folder)
    within = result.counts["duplicate"]
    across = sum(shard.duplicates_elsewhere for shard in index.shards)
    assert within >= 1
    assert across >= 1
    assert within + across == 7
    infos = [ShardInfo.read(folder, shard.name) for shard in index.shards]
    assert mark_duplicates(folder, infos, hashes_at_once=50) == across  # the same in slices of the hash space
    kept = prepare(
        str(path), tokenizer, tmp_path / "all", replace(OPTIONS, clean=replace(OPTIONS.clean, duplicates=False))
    )
    assert kept.documents == len(doubled)


def test_cleaning_is_counted(tmp_path, tokenizer, texts):
    path = write_jsonl(tmp_path / "a.jsonl", [*texts[:5], "", "corto", "a\x07" + texts[6]])
    options = replace(OPTIONS, clean=CleanOptions(min_spanish=0))
    result = prepare(str(path), tokenizer, tmp_path / "p", options)
    assert result.counts["empty"] == result.counts["too_short"] == result.counts["control_removed"] == 1
    stored = json.loads((tmp_path / "p" / "index.json").read_text())
    assert stored["counts"] == result.counts
    assert stored["documents"] == result.documents == 6


def test_bad_files_are_skipped_or_refused(tmp_path, tokenizer, texts):
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "good.jsonl", texts[:10])
    (folder / "bad.txt").write_bytes("año".encode("latin-1"))
    (folder / "empty.parquet").touch()
    result = prepare(str(folder), tokenizer, tmp_path / "p", OPTIONS)
    assert result.documents == 10
    assert {Path(name).name for name in result.bad_files} == {"bad.txt", "empty.parquet"}
    with pytest.raises(DataError, match=r"(bad\.txt|empty\.parquet)"):
        prepare(str(folder), tokenizer, tmp_path / "q", replace(OPTIONS, strict=True))


def test_nothing_left_is_an_error_that_says_why(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["", "  ", "\x00"])
    with pytest.raises(DataError, match=r"no document left .*3 empty"):
        prepare(str(path), tokenizer, tmp_path / "p", OPTIONS)
    write_jsonl(path, ["Ahora hay texto."])  # what was made of nothing is not in the way
    assert prepare(str(path), tokenizer, tmp_path / "p", OPTIONS).documents == 1


def test_a_disk_without_room_says_so(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr("tbf.data.sharding.free_bytes", lambda _: 10_000)
    with pytest.raises(DataError, match=r"the disk has 0\.00 GB free"):
        prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)


def test_a_folder_of_another_corpus_is_refused(tmp_path, corpus, tokenizer, sample_texts):
    prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)
    before = contents(tmp_path / "p")
    with pytest.raises(DataError, match="other sources"):
        prepare("sample", tokenizer, tmp_path / "p", OPTIONS)
    other = SpanishSPMTokenizer.train(sample_texts[:5], 500)
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(str(corpus), other, tmp_path / "p", OPTIONS)
    with pytest.raises(DataError, match="prepared with tokenizer"):
        ShardIndex.read(tmp_path / "p").check_tokenizer(other)
    assert contents(tmp_path / "p") == before


def test_a_flipped_byte_is_found(tmp_path, corpus, tokenizer):
    prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)
    for suffix in ("bin", "idx"):
        path = tmp_path / "p" / f"shard-00003.{suffix}"
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        for processes in (1, 2):
            with pytest.raises(DataError, match=rf"shard-00003\.{suffix}: damaged"):
                verify(tmp_path / "p", processes=processes)
        data[100] ^= 1
        path.write_bytes(data)
    verify(tmp_path / "p")


def test_index_problems(tmp_path, corpus, tokenizer):
    with pytest.raises(DataError, match=r"index\.json: not found; prepare"):
        ShardIndex.read(tmp_path)
    prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)
    path = tmp_path / "p" / "index.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "format": 99}))
    with pytest.raises(DataError, match=r"format 99.*upgrade"):
        ShardIndex.read(tmp_path / "p")
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(DataError, match="malformed"):
        ShardIndex.read(tmp_path / "p")
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        ShardIndex.read(tmp_path / "p")


def test_budget_stops_cleanly_and_goes_on(tmp_path, corpus, shards, tokenizer):
    result = prepare(str(corpus), tokenizer, tmp_path / "p", replace(OPTIONS, disk_budget=150_000))
    assert not result.complete
    assert 0 < result.made < len(ShardIndex.read(shards).shards)
    assert "disk budget" in result.note
    index = ShardIndex.read(tmp_path / "p")
    assert not index.complete
    assert index.documents == result.documents > 0
    verify(tmp_path / "p")
    assert prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS).complete
    assert contents(tmp_path / "p") == contents(shards)


def test_full_disk_leaves_nothing_half_written(tmp_path, corpus, shards, tokenizer):
    """A file size limit stands for a full disk: the kernel refuses to write further."""
    model = tokenizer.save_pretrained(tmp_path / "tok")
    program = f"""
import resource, signal, sys
from dataclasses import replace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from tests.data.conftest import OPTIONS
from tbf.data.sharding import prepare
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import run_program
sys.exit(run_program(lambda: prepare({str(corpus)!r}, SpanishSPMTokenizer.from_pretrained({str(model)!r}),
                                     {str(tmp_path / "p")!r}, replace(OPTIONS, processes=2))))
"""
    (tmp_path / "p").mkdir()
    tokenizer.save_pretrained(tmp_path / "p" / "tokenizer")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "no room left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "p").glob(".*.tmp"))
    prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)
    assert contents(tmp_path / "p") == contents(shards)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path, corpus, tokenizer):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot write"):
        prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)


def test_a_file_in_the_way(tmp_path, corpus, tokenizer):
    (tmp_path / "p").touch()
    with pytest.raises(DataError, match="a file stands where a folder is needed"):
        prepare(str(corpus), tokenizer, tmp_path / "p", OPTIONS)


def test_a_dead_worker_is_reported(tmp_path, corpus, tokenizer, monkeypatch):
    from tbf.data import sharding

    monkeypatch.setattr(sharding, "_make_shard", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="worker process died"):
        prepare(str(corpus), tokenizer, tmp_path / "p", replace(OPTIONS, processes=2))


def test_parse_share():
    assert parse_share("0/1") == (0, 1)
    assert parse_share("3/4") == (3, 4)
    for wrong in ("4/4", "1", "a/b", "-1/2", "1/0", ""):
        with pytest.raises(ConfigError, match="i/n"):
            parse_share(wrong)


def test_a_shard_without_any_document(tmp_path, tokenizer, texts):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:40])
    write_jsonl(tmp_path / "in" / "b.jsonl", [" \n" * 20_000, "\x00" * 20_000])
    write_jsonl(tmp_path / "in" / "c.jsonl", texts[40:80])
    prepare(str(tmp_path / "in"), tokenizer, tmp_path / "p", OPTIONS)
    index = ShardIndex.read(tmp_path / "p")
    assert min(shard.documents for shard in index.shards) == 0
    assert documents(tmp_path / "p", tokenizer) == texts[:80]
    verify(tmp_path / "p")
    assert PackedDataset(tmp_path / "p", seq_len=64).row(0)["segment_ids"].any()


def test_ids_above_65535(tmp_path, tokenizer, texts):
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = pb2.ModelProto()
    model.ParseFromString(tokenizer.model)
    for number in range(65_600):
        model.pieces.add(piece=f"\u2581largo{number}q", score=-5.0)
    large = SpanishSPMTokenizer(model.SerializeToString())
    assert large.vocab_size > 65_536
    rare = [f"{text} largo65599q" for text in texts[:60]]
    prepare(str(write_jsonl(tmp_path / "a.jsonl", rare)), large, tmp_path / "p", OPTIONS)
    assert ShardIndex.read(tmp_path / "p").dtype == np.dtype("<u4")
    assert documents(tmp_path / "p", large) == rare
    dataset = PackedDataset(tmp_path / "p", seq_len=64)
    assert dataset.read(range(dataset.rows_per_epoch))[0].max() == large.vocab_size - 1


def test_parse_sources(tmp_path):
    assert parse_sources("sample") == [("sample", None)]
    assert parse_sources("hf:a/b:train:text") == [("hf:a/b:train:text", None)]
    assert parse_sources("a=3, b=1") == [("a", 0.75), ("b", 0.25)]
    (tmp_path / "x=1,y").mkdir()
    assert parse_sources(str(tmp_path / "x=1,y")) == [(str(tmp_path / "x=1,y"), None)]
    assert parse_sources(["a", "b.txt"]) == [("a", None), ("b.txt", None)]
    assert parse_sources(["a=3,b=1"]) == [("a", 0.75), ("b", 0.25)]
    for wrong in ("a=0.7,b", "a=x,b=1", "a=inf,b=1", "a=-1,b=1"):
        with pytest.raises(ConfigError, match="mixture"):
            parse_sources(wrong)
    for wrong in ("a=0.5,a=0.5", ["a", "b", "a"]):
        with pytest.raises(ConfigError, match="'a' is named twice"):
            parse_sources(wrong)
