from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tbf.data import prepare as prepare_module
from tbf.data.files import folder_lock
from tbf.data.loader import BatchLoader, PackedDataset
from tbf.data.masking import MaskSpec
from tbf.data.prepare import prepare_data, prepare_folder
from tbf.data.ramdisk import RamCopy, is_ram_disk, record_ram_dir
from tbf.data.shards import ShardIndex
from tbf.data.storage import (
    budget_left,
    delete_garbage,
    find_garbage,
    folder_bytes,
    format_garbage,
    human_bytes,
    used_bytes,
)
from tbf.errors import DataError

from .conftest import OPTIONS
from .test_prepare import Section


def fill(path: Path, kilobytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(kilobytes * 1024))
    return path


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_used_bytes_counts_everything_once(tmp_path):
    fill(tmp_path / "cache" / "shards" / "a" / "x.bin", 100)
    fill(tmp_path / "runs" / "r" / "checkpoints" / "c.pt", 200)
    fill(tmp_path / "runs" / "r" / "export" / "m.safetensors", 52)
    os.link(tmp_path / "cache" / "shards" / "a" / "x.bin", tmp_path / "cache" / "link")
    assert folder_bytes(tmp_path / "cache") == 100 * 1024
    nested = [tmp_path / "cache", tmp_path / "runs", tmp_path / "runs" / "r", tmp_path / "missing"]
    assert used_bytes(nested) == 352 * 1024


def test_what_the_budget_leaves(tmp_path):
    fill(tmp_path / "runs" / "c.pt", 500)
    budget = 2e6 / 1e9
    assert budget_left(budget, [tmp_path / "cache"]) == 2_000_000
    assert budget_left(budget, [tmp_path / "cache", tmp_path / "runs"]) == 2_000_000 - 500 * 1024
    assert budget_left(1e-4, [tmp_path / "runs"]) == 0


def test_checkpoints_eat_into_the_budget_of_preparation(tmp_path, corpus, tokenizer):
    fill(tmp_path / "runs" / "checkpoints" / "c.pt", 1000)
    options = {"tokenizer": tokenizer, "options": OPTIONS, "count_too": (tmp_path / "runs",)}
    small = prepare_folder(str(corpus), tmp_path / "p", disk_budget_gb=1.15e-3, **options)
    assert not small.complete
    assert 0 < small.documents < 300
    assert prepare_folder(str(corpus), tmp_path / "p", disk_budget_gb=1.0, **options).complete
    with pytest.raises(DataError, match="disk budget"):
        prepare_folder(str(corpus), tmp_path / "q", disk_budget_gb=1e-4, **options)


def test_gc_lists_and_deletes_only_what_nobody_needs(tmp_path, corpus, tokenizer):
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    for name in ("old", "new", "busy"):
        prepare_folder(str(corpus), cache / "shards" / name, tokenizer=tokenizer, options=OPTIONS)
    age(cache / "shards" / "old" / "plan.json", 45)
    age(cache / "shards" / "busy" / "plan.json", 45)
    left = fill(cache / "shards" / "new" / ".shard-00001.bin.123.tmp", 10)
    age(left, 1)
    fresh = fill(cache / "shards" / "new" / ".shard-00002.bin.124.tmp", 10)
    fill(runs / "a" / "checkpoints" / "step-00000500" / "c.pt", 10)
    fill(runs / "a" / "checkpoints" / ".saving-600" / "c.pt", 10)
    age(runs / "a" / "checkpoints" / ".saving-600", 1)
    with folder_lock(cache / "shards" / "busy", "preparing data"):
        garbage = find_garbage([cache], [runs])
    assert {item.path for item in garbage} == {
        cache / "shards" / "old", left, runs / "a" / "checkpoints" / ".saving-600"
    }  # fmt: skip
    text = format_garbage(garbage, used_bytes([cache, runs]), 10**9)
    assert "--yes" in text
    assert "not opened for 45 days" in text
    assert (cache / "shards" / "old").exists()  # listing deletes nothing
    assert delete_garbage(garbage) == sum(item.bytes for item in garbage) > 100_000
    assert not any(item.path.exists() for item in garbage)
    assert fresh.exists()
    assert ShardIndex.read(cache / "shards" / "new").complete
    assert (runs / "a" / "checkpoints" / "step-00000500" / "c.pt").exists()
    assert find_garbage([cache], [runs], unused_days=0.0) != []


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 999, 1500, 2.5e9, 3e12)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "3.0 TB"]


def test_is_ram_disk(tmp_path):
    assert is_ram_disk(Path("/dev/shm/not/there")) or not Path("/dev/shm").is_dir()
    assert not is_ram_disk(Path("/usr/bin"))


def test_ram_copy_serves_the_same_rows_and_falls_back(tmp_path, shards):
    folder, ram = tmp_path / "p", tmp_path / "ram"
    shutil.copytree(shards, folder)
    ram.mkdir()
    record_ram_dir(folder, ram)
    dataset = PackedDataset(folder, seq_len=64, validation_share=0.1)
    spec = MaskSpec(0.3, dataset.index.vocab_size)
    expected = dataset.read(range(dataset.rows_per_epoch))[0]
    copy = RamCopy(folder, ram, dataset.index.key, leave_free=0)
    copy.start()
    assert copy.wait() == ""
    assert sorted(p.name for p in copy.copy.glob("*.bin")) == sorted(p.name for p in folder.glob("*.bin"))
    for path in folder.glob("shard-*.bin"):
        path.write_bytes(b"")  # whoever still reads the disk will fail
    assert (dataset.read(range(dataset.rows_per_epoch))[0] == expected).all()
    fresh = PackedDataset(folder, seq_len=64, validation_share=0.1)
    steps = iter(BatchLoader(fresh, spec, micro_batch=4, num_workers=1))
    next(steps)
    steps.close()
    shutil.rmtree(ram)
    with pytest.raises(DataError, match="cut short"):
        PackedDataset(folder, seq_len=64, validation_share=0.1).row(0)


def test_ram_copy_stops_when_memory_is_short(tmp_path, shards, monkeypatch):
    from tbf.data import ramdisk

    sizes = sorted(shards.glob("shard-*.bin"))
    rows = sum(p.stat().st_size for p in shards.glob("rows/*/*.rows"))
    room_left = [rows + sum(p.stat().st_size for p in sizes[:3])]

    def free(_):
        used = sum(p.stat().st_size for p in (tmp_path / "ram").rglob("*") if p.is_file())
        return room_left[0] - used

    monkeypatch.setattr(ramdisk, "free_bytes", free)
    (tmp_path / "ram").mkdir()
    copy = RamCopy(shards, tmp_path / "ram", "k" * 64, leave_free=0)
    copy.start()
    assert "no room for shard-00003.bin" in copy.wait()
    assert copy.path("shard-00002.bin").parent == copy.copy
    assert copy.path("shard-00003.bin").parent == shards
    assert not list(copy.copy.rglob(".*.tmp"))


def test_a_cache_on_a_ram_disk_holds_copies_only(tmp_path, corpus, tokenizer, monkeypatch):
    ram, disk = tmp_path / "ram", tmp_path / "disk"
    ram.mkdir()
    monkeypatch.setattr(prepare_module, "is_ram_disk", lambda path: path == ram)
    monkeypatch.setattr(prepare_module, "cache_root", lambda: disk)
    section = replace(Section(), source=str(corpus))
    folder, _ = prepare_data(section, tokenizer, ram, vocab_size=0, progress=True)
    assert disk in folder.parents
    key = ShardIndex.read(folder).key
    deadline = time.monotonic() + 20
    copy = ram / f"tbf-shards-{key[:16]}"
    while len(list(copy.glob("*.bin"))) < len(list(folder.glob("*.bin"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    dataset = PackedDataset(folder, seq_len=128, validation_share=0.1)
    dataset.row(0)
    assert all(copy in file.path.parents for file in next(iter(dataset._files._open.values())))
    # The next run without the RAM disk reads the disk again.
    prepare_data(section, tokenizer, disk, vocab_size=0, progress=False)
    assert PackedDataset(folder, seq_len=128)._files.copy is None
    assert {item.path for item in find_garbage([ram])} == {copy}
