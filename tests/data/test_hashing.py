from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tbf.data.hashing import key, mix, permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_permutation_is_a_bijection(size, seed):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed)), np.arange(size))


def test_permutation_of_one_position_equals_that_of_many():
    many = permute(np.arange(1000), 1000, 42)
    assert [int(permute([i], 1000, 42)[0]) for i in range(0, 1000, 37)] == many[::37].tolist()
    keys = key(7, np.arange(3))
    mixed = permute([5, 5, 5], 1000, keys)
    assert mixed.tolist() == [int(permute([5], 1000, k)[0]) for k in keys]


def test_permutations_look_random():
    size = 10_000
    first, second = permute(np.arange(size), size, 1), permute(np.arange(size), size, 2)
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    assert (first == second).sum() < 10


def test_a_huge_permutation_costs_nothing():
    size = 10**12
    places = permute([0, 1, size - 1], size, 9)
    assert len(set(places.tolist())) == 3
    assert ((places >= 0) & (places < size)).all()


def test_mix_is_splitmix64():
    # The first outputs of the reference generator seeded with 0 and 1234567.
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    assert int(mix(1234567)) == 6457827717110365317


def test_keys_depend_on_every_part_and_its_place():
    assert len({int(key(*parts)) for parts in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (1,), (3, 2)]}) == 6
