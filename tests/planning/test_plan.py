from __future__ import annotations

import pytest

from tbf.config import load_run_config
from tbf.planning.engine_state import Engine
from tbf.planning.machine import choose_machine
from tbf.planning.plan import Planner, memory_by_place
from tbf.planning.report import report

ENGINE = Engine(2, "cpu", reduce_bucket=1_000_000)


def run_of(rows):
    return load_run_config("mini", ["model.num_layers=1", "data.seq_len=64", f"train.micro_batch_size={rows}"])


def beside(planner, rows):
    """Bytes of the host that are neither state nor activations in use."""
    memory = planner.memory(run_of(rows), ENGINE)
    most = memory_by_place(memory.items, memory.activations, planner.machine.device.on_cuda)
    [host] = [verdict for verdict in memory.verdicts if verdict.resource == "host memory"]
    return host.needed - most["host"], memory.activations.own


@pytest.mark.parametrize(("gpu", "grows"), [("cpu", True), ("p40", False)])
def test_gaps_between_activations_count_where_they_lie_in_host_memory(gpu, grows):
    planner = Planner(choose_machine(gpu))
    (few, own_of_few), (many, own_of_many) = beside(planner, 1), beside(planner, 8)
    assert own_of_many > 4 * own_of_few
    assert many - few == (own_of_many - own_of_few if grows else 0)


def test_the_report_adds_up_to_the_verdict():
    plan = Planner(choose_machine("p40")).plan(run_of(2), ENGINE)
    text = report(plan)
    [host] = [verdict.needed for verdict in plan.verdicts if verdict.resource == "host memory"]
    column = text.partition("host memory of each rank")[2].splitlines()
    [most] = [float(line.split()[-1]) for line in column if "at the worst moment" in line]
    [rest] = [float(line.split()[-1]) for line in column if "beside it" in line]
    assert most + rest == pytest.approx(host / 1e9, abs=0.011)
