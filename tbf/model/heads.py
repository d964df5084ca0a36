"""Masked-language-model head and pooling.

Shapes: `B` batch, `T` tokens, `D` hidden, `M` masked slots per row, `e` table width, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from tbf.model.config import UltraConfig
from tbf.model.embeddings import TokenTable
from tbf.model.norms import RMSNorm

IGNORED = -100
"""Label of an empty slot."""


class MaskedLMHead(nn.Module):
    """logits = RMS(GELU(H x)) E^T + b, with E the embedding table. Called on the predicted positions only."""

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        self.norm = RMSNorm(config.embedding_size, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # [V]

    def init_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, table: TokenTable) -> Tensor:
        """hidden [..., D] -> [..., V] over the real vocabulary."""
        return table(self.norm(F.gelu(self.dense(hidden)))) + self.bias


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden [B, T, D], positions [B, M] -> [B, M, D]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def dense_to_slots(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels [B, T] with -100 where nothing is predicted -> (positions [B, M], labels [B, M]).

    M is the fullest row's count. Waits for the device to read it back: training passes slots instead.
    """
    predicted = labels != IGNORED
    slots = max(1, int(predicted.sum(1).max()))
    positions = predicted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    return positions, labels.gather(1, positions)


def masked_lm_loss(logits: Tensor, labels: Tensor, denominator: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over filled slots, divided by `denominator` (None: the number of filled slots).

    logits [B, M, V], labels [B, M] -> (loss, correct predictions), scalars. In data-parallel training the denominator
    is the mean number of slots per rank and micro-batch, so that each masked token of the global batch weighs the same.
    """
    total, correct = _CrossEntropySum.apply(logits.flatten(0, 1), labels.flatten())
    if denominator is None:
        denominator = (labels != IGNORED).sum().clamp(min=1)
    return total / denominator, correct


class _CrossEntropySum(torch.autograd.Function):
    """Cross entropy over the filled slots, and how many of them are right: logits [N, V], labels [N] -> two scalars.

    The log-probabilities become the gradient in place: beside the logits, nothing else of size N V exists, where
    PyTorch's own loss has two more at its peak. A second backward is refused by autograd's version check.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        filled = labels != IGNORED  # [N]
        at = labels.where(filled, 0)[:, None]  # [N, 1]
        log_probs = logits.log_softmax(-1)  # [N, V]
        own = log_probs.gather(1, at)[:, 0]  # [N]
        correct = ((own == log_probs.amax(-1)) & filled).sum()
        ctx.save_for_backward(log_probs, at, filled)
        ctx.mark_non_differentiable(correct)
        return -own.where(filled, 0).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        log_probs, at, filled = ctx.saved_tensors
        factor = torch.where(filled, grad, 0)[:, None]  # [N, 1]
        return log_probs.exp_().mul_(factor).scatter_add_(1, at, -factor), None


def pool(hidden: Tensor, real: Tensor, pooling: str) -> Tensor:
    """hidden [B, T, D], real [B, T] bool -> [B, D]: mean over the real tokens, or the first token (`cls`)."""
    if pooling == "cls":
        return hidden[:, 0]
    weight = real.to(hidden.dtype)  # [B, T]
    return torch.einsum("btd,bt->bd", hidden, weight) / weight.sum(1, keepdim=True).clamp(min=1)
