"""Experts under the engine: ranks whose tokens go to different experts, and what routers report and learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.moe import MixtureOfExperts
from tbf.train.routing import RoutingTotals
from tests.helpers.gloo import deepspeed_on_gloo, run_distributed

CONFIG = UltraConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, retention_heads=2, layer_pattern=("retnet", "ode"),
    factorized_embedding_dim=16, ffn_hidden_size=16, use_moe=True, top_k_experts=1, router_aux_free=True,
    router_balance_coef=0.0, router_z_coef=0.0, use_bitnet=False,
)  # fmt: skip
STEPS = 4
CASES = [(2, False), (2, True), (3, False), (3, True)]  # ZeRO stage, ternary


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(5, 64, (2, 12), generator=generator)
    positions = torch.arange(4).expand(2, 4) * 3
    return {"input_ids": ids, "masked_positions": positions, "masked_labels": ids.gather(1, positions)}


def send_all_tokens_to(model: torch.nn.Module, expert: int) -> None:
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.router_bias.zero_()
            module.router_bias[:, expert] = 10.0


def seeded_model(ternary: bool) -> TormentedBertFrankenstein:
    torch.manual_seed(0)
    model = TormentedBertFrankenstein(CONFIG.replace(use_bitnet=ternary))
    model.set_activation_checkpointing("layer")
    return model


def one_process(ternary: bool) -> list[float]:
    """What two ranks should compute: the mean of the gradients of both micro-batches."""
    model = seeded_model(ternary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for rank in (0, 1):
            send_all_tokens_to(model, expert=rank)
            loss = model(**batch(step, rank)).loss / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses


def one_of_two_ranks(rank: int, world_size: int) -> dict[tuple[int, bool], tuple[list[float], list[float]]]:
    """Losses and assignments per expert of each case, all in one process: starting one takes longest."""
    deepspeed = deepspeed_on_gloo()
    return {case: train_rank(deepspeed, rank, world_size, *case) for case in CASES}


def train_rank(
    deepspeed: Any, rank: int, world_size: int, stage: int, ternary: bool
) -> tuple[list[float], list[float]]:
    model = seeded_model(ternary)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    losses, load = [], torch.zeros(CONFIG.num_experts)
    for step in range(STEPS):
        send_all_tokens_to(engine.module, expert=rank)
        output = engine(**batch(step, rank))
        engine.backward(output.loss)
        engine.step()
        loss = output.loss.detach() / world_size
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        load += output.router["load"].sum((0, 1))
    return losses, load.tolist()


@pytest.fixture(scope="module")
def two_ranks():
    return run_distributed(one_of_two_ranks, 2, timeout_s=150)


@pytest.mark.parametrize(("stage", "ternary"), CASES)
def test_ranks_that_use_different_experts_neither_wait_nor_differ(two_ranks, stage, ternary):
    (first, load_0), (second, load_1) = (results[stage, ternary] for results in two_ranks)
    assert [n > 0 for n in load_0] == [True, False, False, False]
    assert [n > 0 for n in load_1] == [False, True, False, False]
    assert first == second
    assert first == pytest.approx(one_process(ternary), abs=1e-3 if ternary else 1e-5)
    assert first[-1] < first[0]


def test_totals_are_shares_and_means_over_micro_batches():
    totals = RoutingTotals(CONFIG, torch.device("cpu"))
    scalars = {name: torch.tensor(float(i)) for i, name in enumerate(("balance", "z", "entropy"), 1)}
    even, skewed = torch.full((2, 2, 4), 5.0), torch.tensor([[[20.0, 0, 0, 0], [5, 5, 5, 5]]]).expand(2, 2, 4)
    for load in (even, skewed):
        totals.add({**scalars, "load": load, "dropped": torch.zeros(2, 2)})
    totals.reduce()
    assert totals.metrics() == {
        "expert_share_min": 0.125, "expert_share_max": 0.625, "router_entropy": 3.0, "router_balance": 1.0,
        "router_z": 2.0, "router_dropped": 0.0,
    }  # fmt: skip


def test_loops_beyond_the_models_own_count_for_the_last_bias():
    model = TormentedBertFrankenstein(CONFIG)
    totals = RoutingTotals(CONFIG, torch.device("cpu"))
    loads = torch.zeros(3, 2, 4)
    loads[0], loads[1, :, 0], loads[2, :, 1] = 1.0, 1.0, 3.0
    router = {name: torch.zeros(()) for name in ("balance", "z", "entropy", "dropped")}
    totals.add({**router, "load": loads})
    totals.update_biases(model)
    expected = torch.tensor([[0.0, 0, 0, 0], [0, -1, 1, 1]]) * CONFIG.router_bias_rate  # loads 1, 3, 0, 0: mean 1
    for layer in model.layers:
        torch.testing.assert_close(layer.ffn.router_bias, expected)


def test_dense_models_report_nothing():
    totals = RoutingTotals(CONFIG.replace(use_moe=False), torch.device("cpu"))
    totals.add(None)
    totals.reduce()
    assert totals.metrics() == {}
