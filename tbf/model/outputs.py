"""What the encoder returns.

Shapes: `B` batch, `T` tokens, `D` hidden, `M` masked slots per row, `V` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EncoderOutput(NamedTuple):
    """Fields that weren't asked for are None. A tuple, so that DeepSpeed's hooks find the tensors in it."""

    last_hidden_state: Tensor
    """[B, T, D], after the final norm."""
    pooler_output: Tensor
    """[B, D]: the mean over real tokens of the row, or its first token."""
    logits: Tensor | None = None
    """[B, M, V] at the masked slots, over the real vocabulary."""
    loss: Tensor | None = None
    """Scalar: cross entropy plus the weighted router losses."""
    mlm_loss: Tensor | None = None
    """Scalar: the cross entropy alone, detached."""
    masked_correct: Tensor | None = None
    """Scalar: how many masked slots the model predicts right, detached."""
    router: dict[str, Tensor] | None = None
    """Router statistics: scalars are means over visits, others are stacked as [loops, layers, ...]."""
