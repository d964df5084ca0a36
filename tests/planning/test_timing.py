from __future__ import annotations

from collections import Counter

import pytest
import torch

from tbf.planning.engine_state import Engine
from tbf.planning.timing import ADAM_BYTES, engine_bytes
from tests.helpers.gloo import deepspeed_on_gloo, run_distributed

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {
    "zero1, host": {"stage": 1, **OFFLOAD},
    "zero1": {"stage": 1},
    "zero2, host": {"stage": 2, **OFFLOAD},
    "zero2": {"stage": 2},
    "zero3, host": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
    "zero3": {"stage": 3},
}
KEYS = [(1, case, micro) for case in CASES for micro in (1, 2)] + [(2, "zero2, host", 2), (2, "zero3", 1)]
"""(ranks, case, micro-batches)."""
NOT_THE_ENGINES = {"mm", "allreduce_", "_allgather_base_"}
WIDTH, LAYERS = 400, 6


def config_of(zero, micro):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": "offload_optimizer" not in zero}},
        "zero_optimization": {**zero, "reduce_bucket_size": 400_000, "overlap_comm": False},
        "zero_force_ds_cpu_optimizer": False,
    }


def counted(rank, world_size):
    """Bytes that a small engine's operators move in an optimizer step, per parameter, by case."""
    from tbf.planning.trace import Trace
    from tbf.train.build_ops import prepare_ops

    deepspeed = deepspeed_on_gloo()
    prepare_ops(True, lambda text: None)
    found = {}
    for case, micro in [key[1:] for key in KEYS if key[0] == world_size]:
        model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config_of(CASES[case], micro),
            dist_init_required=False,
        )  # fmt: skip

        def step(engine=engine, micro=micro):
            for _ in range(micro):
                engine.backward(engine(torch.ones(1, WIDTH)).sum())
                engine.step()

        step()
        with Trace() as trace:
            step()
        moved = Counter()
        for operation, count in trace.take_work().items():
            moved[operation.name] += count * operation.bytes
        own = sum(size for name, size in moved.items() if name not in NOT_THE_ENGINES)
        found[case, micro] = own / (LAYERS * WIDTH**2)
    return found


@pytest.fixture(scope="module")
def measured():
    return {ranks: run_distributed(counted, ranks)[0] for ranks in (1, 2)}


@pytest.mark.parametrize(("ranks", "case", "micro"), KEYS)
def test_an_engine_moves_what_the_plan_says(measured, ranks, case, micro):
    engine = Engine.from_config(config_of(CASES[case], micro), "none", False)
    planned = sum(engine_bytes(engine, 1, ranks))
    planned -= ADAM_BYTES / ranks if "host" in case else 0  # DeepSpeed's own kernel, which no trace sees
    assert planned == pytest.approx(measured[ranks][case, micro], rel=0.1)
