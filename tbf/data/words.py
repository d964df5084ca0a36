"""Tokenises each different word of a batch once, and the common ones once for all batches.

Pieces never cross white space, so a text's ids are those of its words one after another, and most words come again.
Splitting, grouping and gluing run in Arrow; SentencePiece sees the words that are new.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

REMEMBERED = 200_000
"""Words: the first ones of a corpus are its common ones, and looking up more costs what it saves."""


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class WordEncoder:
    """Spells words with a SentencePiece processor, and remembers the spelling of the first `REMEMBERED` ones."""

    def __init__(self, processor: Any, dtype: np.dtype) -> None:
        self.processor, self.dtype = processor, dtype
        self._words: Any = None
        """Arrow array of the words remembered."""
        self._ids: Any = None
        """Their ids, as bytes in an Arrow array."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of all texts one after another, and where each text ends among them (int64 [texts]).

        Pays off for megabytes of text; the ids are the same for any size and order of batches.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        split = pc.utf8_split_whitespace(pa.array(texts, pa.large_string()))
        grouped = split.flatten().dictionary_encode()
        spelling = self._spell(grouped.dictionary)
        _, word_ends, tokens = spelling.take(grouped.indices).buffers()
        word_ends = np.frombuffer(word_ends, np.int64, len(grouped) + 1) // self.dtype.itemsize
        text_ends = word_ends[np.frombuffer(split.buffers()[1], np.int32, len(texts) + 1)[1:]]
        return np.frombuffer(tokens, self.dtype, int(word_ends[-1])), text_ends

    def _spell(self, words: Any) -> Any:
        """The ids of different words, as bytes in an Arrow array."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._words is None:
            ids = self._spell_new(words)
            self._words, self._ids = words[:REMEMBERED], ids[:REMEMBERED]
            return ids
        places = pc.index_in(words, self._words)
        unknown = places.is_null()
        new = self._spell_new(words.filter(unknown))
        at = pa.array(np.arange(len(new), dtype=np.int32) + len(self._ids))
        return pa.concat_arrays([self._ids, new]).take(pc.replace_with_mask(places, unknown, at))

    def _spell_new(self, words: Any) -> Any:
        import pyarrow as pa

        with _no_garbage_collection():  # it would walk the hundred thousands of new lists again and again
            ids = self.processor.encode(words.to_pylist(), num_threads=1)
            spelled = np.fromiter(itertools.chain.from_iterable(ids), self.dtype)
            ends = np.fromiter(itertools.accumulate(map(len, ids), initial=0), np.int64, len(ids) + 1)
            del ids
        buffers = [None, pa.py_buffer(ends * self.dtype.itemsize), pa.py_buffer(spelled)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(words), buffers)
