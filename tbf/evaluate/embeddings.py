"""Sentence embeddings: the model's pooled output, computed in batches of similar length.

Shapes: `N` texts, `D` hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from tbf.errors import ConfigError, DataError
from tbf.evaluate.batches import by_length, padded

if TYPE_CHECKING:
    from tbf.data.tokenizer import SpanishSPMTokenizer
    from tbf.model.encoder import TormentedBertFrankenstein

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
MAX_LENGTH = 512


@torch.inference_mode()
def embed(
    model: TormentedBertFrankenstein,
    tokenizer: SpanishSPMTokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    max_length: int = MAX_LENGTH,
    normalize: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """Embeds texts: float32 [N, D], rows in the order given, whatever the batches; `normalize` gives unit length.

    Texts of more than `max_length` tokens ([CLS] and [SEP] included) are cut, which is logged once. Raises DataError
    without texts, ConfigError when a size is impossible.
    """
    if not texts:
        raise DataError("there is no text to embed")
    if batch_size < 1 or max_length < 3:
        raise ConfigError(f"batch_size {batch_size} must be at least 1 and max_length {max_length} at least 3")
    rows = [tokenizer.encode(text)["input_ids"] for text in texts]
    cut = [index for index, row in enumerate(rows) if len(row) > max_length]
    for index in cut:
        rows[index] = [*rows[index][: max_length - 1], tokenizer.sep_id]
    if cut:
        facts = (len(cut), len(rows), max_length, cut[0] + 1)
        logger.warning("%d of %d texts were cut to %d tokens, the first is text %d", *facts)
    device = next(model.parameters()).device
    model.eval()
    result = np.empty((len(rows), model.config.hidden_size), dtype=np.float32)  # [N, D]
    with tqdm(total=len(rows), unit=" texts", disable=None if progress else True) as bar:
        for batch in by_length(list(map(len, rows)), batch_size):
            result[batch] = _embed_batch(model, [rows[index] for index in batch], tokenizer.pad_id, device)
            bar.update(len(batch))
    if normalize:
        result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return result


def _embed_batch(
    model: TormentedBertFrankenstein, rows: list[list[int]], pad_id: int, device: torch.device
) -> np.ndarray:
    """Rows of ids -> [rows, D]."""
    ids, mask = (torch.from_numpy(array).to(device) for array in padded(rows, pad_id))
    return model(ids, attention_mask=mask).pooler_output.float().cpu().numpy()
