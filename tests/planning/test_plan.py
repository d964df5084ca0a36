from __future__ import annotations

from dataclasses import replace

import pytest

from tbf.config import load_run_config
from tbf.planning.engine_state import Engine
from tbf.planning.machine import choose_machine
from tbf.planning.plan import Planner, heap_gaps, memory_by_place
from tbf.planning.report import report

ENGINE = Engine(2, "cpu", reduce_bucket=1_000_000)


def run_of(rows):
    return load_run_config("mini", ["model.num_layers=1", "data.seq_len=64", f"train.micro_batch_size={rows}"])


def beside(planner, rows):
    """Bytes of the host that are neither state nor activations in use, and of these activations."""
    memory = planner.memory(run_of(rows), ENGINE)
    most = memory_by_place(memory.items, memory.activations, planner.machine.device.on_cuda)
    return needed_of_host(memory) - most["host"], heap_gaps(memory.activations)


def needed_of_host(plan):
    [host] = [verdict for verdict in plan.verdicts if verdict.resource == "host memory"]
    return host.needed


@pytest.mark.parametrize(("gpu", "grows"), [("cpu", True), ("p40", False)])
def test_gaps_between_activations_count_where_they_lie_in_host_memory(gpu, grows):
    planner = Planner(choose_machine(gpu))
    (few, gaps_of_few), (many, gaps_of_many) = beside(planner, 1), beside(planner, 8)
    assert gaps_of_many > 4 * gaps_of_few > 0
    assert many - few == (gaps_of_many - gaps_of_few if grows else 0)


def test_what_comes_and_goes_leaves_more_gaps_than_what_is_kept():
    planner, run = Planner(choose_machine("cpu")), load_run_config("mini", ["train.micro_batch_size=8"])
    engines = [replace(ENGINE, granularity=name) for name in ("none", "layer")]
    none, layer = (planner.memory(run, engine).activations for engine in engines)
    assert heap_gaps(layer) / layer.own > 1.2 * heap_gaps(none) / none.own
    assert heap_gaps(layer) < heap_gaps(none)


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_lines_of_the_report_add_up_to_the_verdict(gpus):
    plan = Planner(choose_machine("p40", gpus=gpus)).plan(run_of(2), ENGINE)
    lines = report(plan).partition("host memory of each rank, GB\n")[2].partition("at the worst moment")
    always = [float(line.split()[-1]) for line in lines[0].splitlines() if line and line[-1].isdigit()]
    assert len(always) == 8  # five of the engine's, Python, the loader and the freed weights
    total = float(lines[2].split()[0])
    assert sum(always) == pytest.approx(total, abs=0.05) == needed_of_host(plan) / 1e9 / gpus


@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_that_host_memory_holds_whole_never_wait_for_the_disk(ranks):
    engine = Engine(3, "nvme", "nvme", sub_group=1_000_000)
    items = Planner(choose_machine("p40", gpus=ranks)).memory(run_of(1), engine).items
    assert not [item for item in items if item.name == "updated weights on their way to NVMe"]
