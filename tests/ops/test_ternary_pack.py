"""Five ternary values a byte, and back."""

import pytest
import torch

from tbf.errors import CheckpointError
from tbf.ops.ternary_backends import TernaryPlan, prepare_weight
from tbf.ops.ternary_pack import pack_trits, pack_weight, packed_width, prepare_packed, unpack_trits


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 5), (3, 6), (2, 3, 13), (0, 7), (4, 0)])
def test_values_come_back(shape):
    values = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_trits(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*shape[:-1], packed_width(shape[-1])))
    assert torch.equal(unpack_trits(packed, shape[-1]), values)


def test_every_byte_means_another_row():
    packed = torch.arange(243, dtype=torch.uint8)[:, None]
    values = unpack_trits(packed, 5)
    assert len(values.unique(dim=0)) == 243
    assert torch.equal(pack_trits(values), packed)


def test_first_value_is_the_lowest_digit():
    assert pack_trits(torch.tensor([[1, 0, 0, 0, 0], [-1, -1, -1, -1, 1]], dtype=torch.int8)).tolist() == [[122], [162]]


def test_impossible_bytes_are_refused():
    with pytest.raises(CheckpointError, match="impossible byte"):
        unpack_trits(torch.tensor([[0, 243]], dtype=torch.uint8), 10)


@pytest.mark.parametrize("slices", [(8,), (3, 5)])
def test_packed_weights_are_the_prepared_ones(slices):
    weight = torch.randn(8, 13)
    plan = TernaryPlan("fp32", "fp32")
    expected = prepare_weight(weight, slices, plan)
    trits, scales = pack_weight(weight, slices)
    assert scales.shape == (len(slices),)
    (prepared,) = prepare_packed(trits, scales, slices, 13, plan)
    assert torch.equal(prepared.scales, expected.scales)
    assert all(map(torch.equal, prepared.forward, expected.forward))


def test_each_expert_has_scales_of_its_own():
    weight = torch.randn(3, 8, 13) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    trits, scales = pack_weight(weight, (3, 5))
    assert (trits.shape, scales.shape) == ((3, 8, 3), (3, 2))
    assert torch.allclose(scales[1], weight[1].split([3, 5])[0].abs().mean(), rtol=0.5)
    for expert, matrix in enumerate(weight):
        alone = pack_weight(matrix, (3, 5))
        assert torch.equal(trits[expert], alone[0])
        assert torch.equal(scales[expert], alone[1])
