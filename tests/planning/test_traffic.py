"""What the stages must move, counted by hand for a ring; benchmarks/communication.py holds it to real counters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tbf.errors import ConfigError
from tbf.planning.engine_state import Engine, ModelFacts
from tbf.planning.machine import choose_machine
from tbf.planning.plan import GIGABIT, Planner
from tbf.planning.traffic import step_traffic

MODEL = ModelFacts(total=1000, largest=400, largest_module=600, small=100, sizes=(400, 300, 200, 50, 50))
ZERO1 = Engine(1, reduce_bucket=500)


def sent(engine: Engine, ranks: int = 4, loops: int = 2) -> int:
    return step_traffic(MODEL, engine, ranks, loops, 0, on_cuda=False).network


def hops(engine: Engine, ranks: int = 4) -> int:
    return step_traffic(MODEL, engine, ranks, 2, 0, on_cuda=False).hops - 2 * 5 * (ranks - 1)


def test_a_single_rank_sends_nothing():
    for stage in (1, 2, 3):
        traffic = step_traffic(MODEL, Engine(stage), 1, 2, 0, on_cuda=False)
        assert traffic.network == traffic.hops == 0


def test_zero1_moves_gradients_once_a_step_and_zero2_for_every_micro_batch():
    ring = 4 * 1000 * 3 // 4
    assert sent(ZERO1) == sent(replace(ZERO1, accumulation=8)) == 3 * ring
    assert sent(Engine(2)) == 3 * ring
    assert sent(Engine(2, accumulation=8)) == (2 * 8 + 1) * ring


def test_zero3_gathers_what_does_not_stay():
    ring, small = 4 * 1000 * 3 // 4, 4 * 100 * 3 // 4
    stays = Engine(3, persistence=100, max_live=1000, granularity="layer")
    assert sent(stays) == 2 * (ring - small) + ring + small
    assert sent(replace(stays, accumulation=4)) == 4 * (2 * (ring - small) + ring) + small
    goes = replace(stays, max_live=999)
    assert sent(goes) == 2 * 3 * (ring - small) + ring + small
    assert sent(replace(goes, granularity="none")) == 2 * 2 * (ring - small) + ring + small


def test_buckets_and_layers_cost_latency():
    assert hops(ZERO1) == (2 * 2 + 1) * 3  # two all-reduces of 500 elements and one gathering, around a ring of four
    assert hops(replace(ZERO1, reduce_bucket=1000)) == (2 + 1) * 3
    assert hops(Engine(3, persistence=100, max_live=1000)) == (2 * 3 + 1 + 1) * 3  # three layers, forward and backward


def test_the_network_of_several_nodes_is_what_the_options_say():
    machine = choose_machine("p40", gpus=2, nodes=3, network_gbit=1.0, latency_ms=0.2)
    assert machine.network == GIGABIT and machine.latency == pytest.approx(2e-4)
    assert Planner(machine)._network() == pytest.approx((GIGABIT * 1448 / 1538, 2e-4))
    assert Planner(replace(machine, nodes=1))._network()[1] == 0.0
    for options in ({"latency_ms": -1.0}, {"network_gbit": 0.0}):
        with pytest.raises(ConfigError, match=r"--latency|--network"):
            choose_machine("p40", **options)
