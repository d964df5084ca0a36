"""Token embeddings: a factorised table, a short convolution inside each document, a projection, unit RMS.

Shapes: `B` batch, `T` tokens, `D` hidden, `e` table width, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.config import UltraConfig
from tbf.model.conv import SegmentConv
from tbf.model.norms import RMSNorm


class TokenTable(nn.Module):
    """The vocabulary table, used both ways: ids are looked up, vectors are scored against every token.

    Both uses go through this module's forward because ZeRO-3 gathers a parameter around the forward of its owner.
    Rows beyond `vocab_size` only round the table up; no id reaches them and they get no score.
    """

    def __init__(self, vocab_size: int, rows: int, width: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(rows, width))  # [padded V, e]

    def forward(self, x: Tensor) -> Tensor:
        """Integer ids [...] -> [..., e]; floating-point vectors [..., e] -> scores [..., V]."""
        if x.is_floating_point():
            return F.linear(x, self.weight[: self.vocab_size])
        return F.embedding(x, self.weight)


class Embeddings(nn.Module):
    """x0 = RMS(P Conv(E[ids])) (factorisation: ALBERT, 1909.11942)."""

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        width = config.embedding_size
        self.table = TokenTable(config.vocab_size, config.padded_vocab_size, width)
        self.conv, self.projection = None, None
        if config.use_embedding_conv:
            self.conv = SegmentConv(width, config.embedding_conv_kernel, identity=True)
        if config.use_factorized_embedding:
            self.projection = nn.Linear(width, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor, segments: Tensor) -> Tensor:
        """input_ids [B, T], segments [B, T] -> [B, T, D]."""
        x = self.table(input_ids)  # [B, T, e]
        if self.conv is not None:
            x = self.conv(x, segments)
        if self.projection is not None:
            x = self.projection(x)  # [B, T, D]
        return self.norm(x)
