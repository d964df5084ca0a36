"""Row 6: documents packed in a row compute what they compute alone."""

import pytest
import torch

from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tests.parity.conftest import relative

PATTERNS = {
    "retnet": ["retnet"],
    "mamba": ["mamba"],
    "titan_attn with memory": ["titan_attn"],
    "titan_attn, local": ["titan_attn:local"],
    "ode": ["ode"],
    "standard_attn": ["standard_attn"],
    "sigmoid_attn": ["sigmoid_attn"],
    "whole model": ["retnet", "titan_attn", "retnet", "mamba", "titan_attn", "ode"],
}
LENGTHS = (70, 33, 130)


def build(name):
    whole = name == "whole model"
    torch.manual_seed(0)
    config = UltraConfig(
        vocab_size=300, hidden_size=64, num_heads=4, retention_heads=4, factorized_embedding_dim=32, mamba_head_dim=32,
        mamba_state_size=16, titan_memory="linear", titan_chunk_size=16, window=32, use_bitnet=False,
        layer_pattern=PATTERNS[name], num_layers=6 if whole else 1, num_loops=2 if whole else 1,
    )  # fmt: skip
    model = TormentedBertFrankenstein(config)
    with torch.no_grad():  # off the neutral start, where mixers change little
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 300, (n,), generator=generator) for n in LENGTHS]


def packed(pieces, padding=23):
    ids = torch.cat([*pieces, torch.zeros(padding, dtype=torch.long)])[None]
    lengths = torch.tensor([*map(len, pieces), padding])
    return ids, torch.repeat_interleave(torch.tensor([*range(1, len(pieces) + 1), 0]), lengths)[None]


@pytest.mark.parametrize("name", PATTERNS)
def test_packed_equals_alone_equals_padded(measured, name):
    model, pieces = build(name), documents()
    ids, segments = packed(pieces)
    together = model(ids, segment_ids=segments).last_hidden_state[0].split([*LENGTHS, 23])
    rows = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    batch = model(rows, attention_mask=rows != 0).last_hidden_state
    worst = 0.0
    for i, piece in enumerate(pieces):
        alone = model(piece[None]).last_hidden_state[0]
        worst = max(worst, relative(together[i], alone), relative(batch[i, : len(piece)], alone))
    measured(6, f"packed and padded rows: {name}", "each document alone", worst, 1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_leaks_between_documents(measured, name):
    model, pieces = build(name), documents()
    ids, segments = packed(pieces)
    target = segments[0] == 2

    def gradients(ids):
        model.zero_grad()
        hidden = model(ids, segment_ids=segments).last_hidden_state[0, target]
        hidden.pow(3).sum().backward()
        return [
            hidden.detach(),
            *(p.grad for n, p in model.named_parameters() if p.grad is not None and "table" not in n),
        ]

    noise = torch.randint(5, 300, ids.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(gradients(ids), gradients(torch.where(target, ids, noise)))
    leak = max((a - b).abs().max().item() for a, b in pairs)
    measured(6, f"other documents replaced: {name}", "same output and gradients", leak, 0.0)
