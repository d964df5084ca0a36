"""What a model would write where a text says [MASK].

Shapes: `T` tokens, `M` masks, `V` vocabulary, `k` candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tbf.data.tokenizer import SPECIAL_TOKENS
from tbf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tbf.data.tokenizer import SpanishSPMTokenizer
    from tbf.model.encoder import TormentedBertFrankenstein

MASK = SPECIAL_TOKENS[4]
LONGEST = 8192
"""Tokens; a longer text around a mask is refused rather than cut, since the mask might be cut away."""


@dataclass(frozen=True)
class Candidate:
    """One way to fill one mask."""

    token: str
    """The token as text, without the space before a word."""
    token_id: int
    probability: float
    """Among all tokens that a text can hold, the other masks left as they are."""
    text: str
    """The text with this mask filled; other masks stay."""


@torch.inference_mode()
def fill_mask(
    model: TormentedBertFrankenstein, tokenizer: SpanishSPMTokenizer, text: str, top_k: int = 5
) -> list[list[Candidate]]:
    """Returns, for each [MASK] in order, its `top_k` candidates, best first.

    Raises DataError when the text has no [MASK] or is too long, ConfigError when top_k is not positive.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}; ask for at least 1 candidate")
    ids = tokenizer.encode(text)["input_ids"]
    positions = [index for index, token in enumerate(ids) if token == tokenizer.mask_id]
    if not positions:
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise DataError(f'"{shown}" has no {MASK}; write {MASK} where a word is to be guessed')
    if len(ids) > LONGEST:
        raise DataError(f"the text has {len(ids)} tokens, more than {LONGEST}; give the sentences around {MASK} only")
    rows = torch.tensor([ids], device=next(model.parameters()).device)  # [1, T]
    logits = model.predict(model.eval()(rows).last_hidden_state[0, positions])  # [M, V]
    logits[:, : len(SPECIAL_TOKENS)] = -torch.inf  # special tokens are no answers
    probabilities, tokens = (
        logits.float().softmax(-1).topk(min(top_k, len(tokenizer) - len(SPECIAL_TOKENS)))
    )  # [M, k] each
    return [
        [_candidate(tokenizer, ids, at, token, p) for p, token in zip(*row)]
        for at, *row in zip(positions, probabilities.tolist(), tokens.tolist())
    ]


def _candidate(tokenizer: SpanishSPMTokenizer, ids: list[int], at: int, token: int, probability: float) -> Candidate:
    filled = [*ids[1:at], token, *ids[at + 1 : -1]]
    text = tokenizer.decode(filled, skip_special_tokens=False)
    shown = str(tokenizer.decode([token])).strip() or tokenizer.id_to_piece(token)  # a lone space or half a character
    return Candidate(shown, token, probability, str(text).strip())
