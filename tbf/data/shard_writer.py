"""Writes one shard: cleans, drops repetitions, tokenises in batches, and renames when everything is on the disk."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from tbf.data.cleaning import CleanOptions, clean
from tbf.data.files import write_bytes, write_errors, write_json
from tbf.data.shards import ShardInfo
from tbf.data.tokenizer import SpanishSPMTokenizer, token_dtype

_BATCH_CHARS = 16 << 20
"""Text cleaned and tokenised at a time."""


class ShardWriter:
    """Cleans, deduplicates, tokenises and writes the documents of one shard, aside until `finish`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        source: str,
        tokenizer: SpanishSPMTokenizer,
        options: CleanOptions,
    ) -> None:
        self.folder, self.name, self.tokenizer, self.options = folder, name, tokenizer, options
        self.info = ShardInfo(name, source, token_bytes=token_dtype(tokenizer.vocab_size).itemsize)
        self.counts: Counter[str] = Counter()
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._ends: list[int] = [0]
        self._hashes: list[int] = []
        self._seen: set[int] = set()
        self._texts: list[str] = []
        self._waiting = 0
        self._digest = hashlib.sha256()
        self._aside = folder / f".{name}.bin.{os.getpid()}.tmp"
        with write_errors(self._aside):
            self._file = self._aside.open("wb")

    @property
    def tokens(self) -> int:
        return self._ends[-1]

    def add(self, text: str) -> None:
        """Takes one raw document."""
        self.info.read_documents += 1
        for document in clean(text, self.options, self.counts):
            encoded = document.encode("utf-8")
            key = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
            if self.options.duplicates:
                if key in self._seen:
                    self.counts["duplicate"] += 1
                    continue
                self._seen.add(key)
            self._texts.append(document)
            self._hashes.append(key)
            self.info.text_bytes += len(encoded)
            self._waiting += len(document)
            if self._waiting >= _BATCH_CHARS:
                self.flush()

    def flush(self) -> None:
        """Tokenises and writes what is waiting."""
        if not self._texts:
            return
        ids, ends = self.tokenizer.encode_batch(self._texts)
        kept_hashes = self._hashes[: len(self._hashes) - len(self._texts)]
        framed = np.empty(len(ids) + 2 * len(ends), self._dtype)
        start = at = 0
        for key, end in zip(self._hashes[len(kept_hashes) :], ends.tolist()):
            if end == start:
                self.counts["no_tokens"] += 1
                continue
            kept_hashes.append(key)
            framed[at] = self.tokenizer.cls_id
            framed[at + 1 : at + 1 + end - start] = ids[start:end]
            at += end - start + 2
            framed[at - 1] = self.tokenizer.sep_id
            self._ends.append(self._ends[-1] + end - start + 2)
            start = end
        self._hashes, self._texts, self._waiting = kept_hashes, [], 0
        self.info.unknown_tokens += int(np.count_nonzero(ids == self.tokenizer.unk_id))
        data = framed[:at].tobytes()
        self._digest.update(data)
        with write_errors(self._aside):
            self._file.write(data)

    def finish(self, bad_records: Counter[str], bad_files: dict[str, str]) -> ShardInfo:
        """Flushes to the disk and renames: tokens, then offsets, then the counts that mark the shard as finished."""
        self.flush()
        with write_errors(self._aside):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        index = np.array(self._ends + self._hashes, "<u8").tobytes()
        info = self.info
        info.documents, info.tokens = len(self._hashes), self._ends[-1]
        info.counts = dict(sorted((self.counts + bad_records).items()))
        info.bad_files = dict(sorted(bad_files.items()))
        info.sha256 = {"bin": self._digest.hexdigest(), "idx": hashlib.sha256(index).hexdigest()}
        with write_errors(self._aside):
            self._aside.replace(self.folder / f"{self.name}.bin")
        write_bytes(self.folder / f"{self.name}.idx", index, durable=False)
        write_json(self.folder / f"{self.name}.json", info.to_dict())
        return info

    def discard(self) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)
