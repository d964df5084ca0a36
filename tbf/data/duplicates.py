"""Exact duplicates across shards, found after the shards are written.

Workers only see their own shard, so that shards do not depend on who made them. Here the recorded text hashes are
compared, a slice of the hash space at a time: exact, in bounded memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tbf.data.files import write_bytes, write_json
from tbf.data.shards import ShardInfo, read_documents

HASHES_AT_ONCE = 20_000_000
"""About 1 GB of memory while a slice is sorted."""


def mark_duplicates(folder: Path, shards: Sequence[ShardInfo], *, hashes_at_once: int = HASHES_AT_ONCE) -> int:
    """Writes `shard-*.dup` for documents that an earlier shard has too, notes them in the infos, returns how many."""
    total = sum(shard.documents for shard in shards)
    slices = max(1, -(-total // hashes_at_once))
    found: list[list[np.ndarray]] = [[] for _ in shards]
    for number in range(slices):
        hashes, owners, documents = [], [], []
        for owner, shard in enumerate(shards):
            _, values = read_documents(folder, shard)
            picked = np.flatnonzero(values % np.uint64(slices) == number)
            hashes.append(values[picked])
            owners.append(np.full(len(picked), owner, "<u4"))
            documents.append(picked.astype("<u4"))
        keys, owner, document = map(np.concatenate, (hashes, owners, documents))
        order = np.argsort(keys, kind="stable")  # stable: the first shard's copy comes first
        sorted_keys = keys[order]
        again = order[1:][sorted_keys[1:] == sorted_keys[:-1]]
        again = again[np.argsort(owner[again], kind="stable")]
        bounds = np.searchsorted(owner[again], np.arange(len(shards) + 1))
        for index in range(len(shards)):
            found[index].append(document[again[bounds[index] : bounds[index + 1]]])
    for shard, parts in zip(shards, found):
        numbers = np.sort(np.concatenate(parts)) if parts else np.zeros(0, "<u4")
        path = folder / f"{shard.name}.dup"
        digest = hashlib.sha256(numbers.tobytes()).hexdigest() if len(numbers) else None
        if shard.sha256.get("dup") != digest or shard.duplicates_elsewhere != len(numbers):
            shard.duplicates_elsewhere = len(numbers)
            shard.sha256.pop("dup", None)
            if digest:
                write_bytes(path, numbers.tobytes())
                shard.sha256["dup"] = digest
            write_json(folder / f"{shard.name}.json", shard.to_dict())
        if not digest:
            path.unlink(missing_ok=True)
    return sum(shard.duplicates_elsewhere for shard in shards)
