"""Row 12: ternary linear layers, looped weights and recomputation."""

import copy
from collections import Counter

import pytest
import torch

from tbf.model.bitlinear import BitLinear
from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.segment_info import SegmentInfo
from tests.parity.conftest import random, relative


def test_bitlinear_against_transformers(measured):
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="transformers is not installed")
    theirs = bitnet.AutoBitLinear(128, 96, bias=False, online_quant=True)
    layer = BitLinear(128, 96)
    with torch.no_grad():
        layer.weight.copy_(random(96, 128) * 0.02)
        theirs.weight.copy_(layer.weight)
    x = random(4, 50, 128, seed=1)
    with torch.compiler.set_stance("force_eager"):
        expected = theirs(x)
    measured(12, "BitLinear", "transformers AutoBitLinear, online_quant", relative(layer(x), expected), 1e-6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = UltraConfig(
        vocab_size=200, hidden_size=64, num_layers=6, num_loops=2, num_heads=4, retention_heads=4, ode_steps=2,
        titan_memory="linear", titan_chunk_size=16, factorized_embedding_dim=32, mamba_head_dim=32,
        mamba_state_size=16, use_bitnet=False,
    )  # fmt: skip
    return TormentedBertFrankenstein(config)


def batch():
    ids = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 22 + [2] * 14 + [0] * 4, [1] * 40])
    return ids, segments


def gradients(model, ids, segments):
    model.zero_grad()
    model(ids, segment_ids=segments).last_hidden_state.pow(3).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loops_against_an_unrolled_copy(measured, model):
    ids, segments = batch()
    shared = gradients(model, ids, segments)
    expected_hidden = model(ids, segment_ids=segments).last_hidden_state

    model.zero_grad()
    copies = [copy.deepcopy(model.layers) for _ in range(2)]
    info, x0, x = SegmentInfo.build(model.config, segments), model.embeddings(ids, segments), None
    for loop, layers in enumerate(copies):
        x = model.loop_start(x, x0, loop)
        for layer in layers:
            x, _ = layer(x, info, loop)
    hidden = model.final_norm(x)
    hidden.pow(3).mean().backward()
    errors = [relative(expected_hidden, hidden)]
    for name, parameter in copies[0].named_parameters():
        total = sum(dict(c.named_parameters())[name].grad for c in copies)
        if total.norm() > 0:
            errors.append(relative(shared[f"layers.{name}"], total))
        assert parameter.grad is not None
    measured(12, "two loops, output and gradients", "unrolled copy, gradients added", max(errors), 1e-5)


@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_recomputation_changes_no_gradient(measured, model, mode):
    plain = gradients(model, *batch())
    model.set_activation_checkpointing(mode)
    again = gradients(model, *batch())
    worst = max((plain[name] - again[name]).abs().max().item() for name in plain)
    measured(12, f"gradients, checkpointing per {mode}", "without checkpointing", worst, 0.0)


@pytest.mark.parametrize("mode", ["none", "layer", "loop"])
def test_shared_weights_report_their_gradient_once(measured, model, mode):
    model.set_activation_checkpointing(mode)
    fired = Counter()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.update([name]))
    ids, segments = batch()
    model(ids, segment_ids=segments).last_hidden_state.pow(3).mean().backward()
    measured(12, f"gradient hooks beyond one per weight, {mode}", "one", max(fired.values()) - 1, 0)
