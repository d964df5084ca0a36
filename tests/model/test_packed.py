"""Packed layers compute what the layers that they were packed from compute, bit for bit."""

import copy

import pytest
import torch

from tbf.errors import ConfigError
from tbf.model.bitlinear import BitLinear, set_ternary_plan
from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.packed import PackedExperts, PackedLayer, PackedLinear, pack_layers, ternary_layers
from tbf.ops.ternary_backends import BACKENDS, TernaryPlan
from tbf.ops.ternary_pack import pack_weight
from tests.helpers.runs import TINY
from tests.ops.test_ternary import served

SHAPE = {"vocab_size": 70, **TINY["model"], "norm_type": "rms"}


def packed_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A packed model with the values of `model`."""
    packed = copy.deepcopy(model)
    pack_layers(packed)
    for name, layer in ternary_layers(model).items():
        twin = packed.get_submodule(name)
        twin.trits, twin.scales = pack_weight(layer.weight, layer.slices)
    return packed


@pytest.fixture(params=[{}, {"use_moe": True, "ffn_activation": "swiglu", "num_experts": 3}], ids=["dense", "experts"])
def model(request: pytest.FixtureRequest) -> TormentedBertFrankenstein:
    torch.manual_seed(0)
    return TormentedBertFrankenstein(UltraConfig(**SHAPE, **request.param)).eval()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if served(name)])
def test_a_packed_model_gives_the_same_bits(model, backend):
    ids = torch.randint(5, 70, (3, 17))
    segments = torch.ones_like(ids)
    segments[0, 9:], segments[1, 14:] = 2, 0
    packed = packed_copy(model)
    kinds = {type(layer) for layer in packed.modules() if isinstance(layer, PackedLayer)}
    assert kinds == ({PackedLinear, PackedExperts} if model.config.use_moe else {PackedLinear})
    assert not ternary_layers(packed)
    for each in (model, packed):
        set_ternary_plan(each, TernaryPlan(backend, "fp32"))
    with torch.no_grad():
        expected, found = (each(ids, segment_ids=segments).last_hidden_state for each in (model, packed))
        assert torch.equal(found, expected)
        assert torch.equal(packed.predict(found), model.predict(expected))


def test_unpacked_once(model):
    packed = packed_copy(model)
    ids = torch.randint(5, 70, (2, 9))
    packed(ids)
    packed(ids)
    assert {layer.ternary_cache.quantisations for layer in packed.modules() if isinstance(layer, PackedLayer)} == {1}


def test_gradients_are_refused_rather_than_lost():
    layer = PackedLinear(BitLinear(10, 4))
    layer.trits.fill_(121)
    with pytest.raises(ConfigError, match="no gradients"):
        layer(torch.randn(2, 10, requires_grad=True))
    with torch.no_grad():
        assert layer(torch.randn(2, 10, requires_grad=True)).shape == (2, 4)


def test_nothing_of_a_packed_model_asks_for_gradients(model):
    packed = packed_copy(model)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert not packed(torch.randint(5, 70, (1, 5))).pooler_output.requires_grad
