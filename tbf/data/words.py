"""Tokenises each different word of a batch once.

Pieces never cross white space, so a text's ids are those of its words one after another, and most words of a batch come
again. Splitting, grouping and gluing run in Arrow; SentencePiece sees each word once.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def encode_batch(processor: Any, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of all texts one after another, and where each text ends among them (int64 [texts]).

    Pays off for megabytes of text; the ids are the same for any size of batch.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    split = pc.utf8_split_whitespace(pa.array(texts, pa.large_string()))
    grouped = split.flatten().dictionary_encode()
    with _no_garbage_collection():  # it would walk the hundred thousands of new lists again and again
        ids = processor.encode(grouped.dictionary.to_pylist(), num_threads=1)
        spelled = np.fromiter(itertools.chain.from_iterable(ids), dtype)
        ends = np.fromiter(itertools.accumulate(map(len, ids), initial=0), np.int64, len(ids) + 1)
        del ids
    buffers = [None, pa.py_buffer(ends * dtype.itemsize), pa.py_buffer(spelled)]
    spelling = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends) - 1, buffers)
    _, word_ends, tokens = spelling.take(grouped.indices).buffers()
    word_ends = np.frombuffer(word_ends, np.int64, len(grouped) + 1) // dtype.itemsize
    text_ends = word_ends[np.frombuffer(split.buffers()[1], np.int32, len(texts) + 1)[1:]]
    return np.frombuffer(tokens, dtype, int(word_ends[-1])), text_ends
