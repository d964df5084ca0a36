"""Two ranks whose tokens go to different experts, under ZeRO: no rank waits for the other, and the sum is right."""

import pytest
import torch
from torch import Tensor, nn

from tbf.model.config import UltraConfig
from tbf.model.moe import MixtureOfExperts
from tbf.model.segment_info import SegmentInfo
from tests.helpers.gloo import run_distributed

STEPS, LEARNING_RATE = 2, 0.5
CASES = [(stage, ternary) for stage in (2, 3) for ternary in (False, True)]


class Block(nn.Module):
    """An expert block whose router sends positive tokens to experts 0 and 1, negative ones to 2 and 3."""

    def __init__(self, ternary: bool) -> None:
        super().__init__()
        config = UltraConfig(
            hidden_size=16, ffn_hidden_size=24, num_heads=2, retention_heads=2, mamba_head_dim=16, use_moe=True,
            use_bitnet=ternary,
        )  # fmt: skip
        torch.manual_seed(0)
        self.moe = MixtureOfExperts(config)
        self.moe.init_parameters()
        with torch.no_grad():
            self.moe.router.copy_(torch.tensor([1.0, 1.1, -1.0, -1.1])[:, None].expand(4, 16))
        self.info = SegmentInfo.build(config, torch.ones(2, 6, dtype=torch.long))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        y, stats = self.moe(u, self.info)
        return (u + y).square().mean() + 0.01 * stats["balance"], stats["load"]


def batch(rank: int) -> Tensor:
    return (1 - 2 * rank) * torch.rand(2, 6, 16, generator=torch.Generator().manual_seed(rank))


def train(rank: int, world_size: int, stage: int, ternary: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Loads of the rank's last step, and the weights after it."""
    from tests.helpers.gloo import deepspeed_on_gloo

    deepspeed = deepspeed_on_gloo()
    model = Block(ternary)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    for _ in range(STEPS):
        loss, load = engine(batch(rank))
        engine.backward(loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return load.tolist(), {name: w.numpy() for name, w in weights.items()}


def all_cases(rank: int, world_size: int) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [train(rank, world_size, *case) for case in CASES]


@pytest.fixture(scope="module")
def outcomes():
    """What each rank reports for each case; one launch, because starting ranks takes longest."""
    return dict(zip(CASES, zip(*run_distributed(all_cases, 2))))


@pytest.mark.parametrize(("stage", "ternary"), CASES)
def test_ranks_with_different_experts(outcomes, stage, ternary):
    reference = Block(ternary)
    optimizer = torch.optim.SGD(reference.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (sum(reference(batch(rank))[0] for rank in range(2)) / 2).backward()
        optimizer.step()

    (first_load, weights), (second_load, same) = outcomes[stage, ternary]
    assert first_load == [12, 12, 0, 0] and second_load == [0, 0, 12, 12]
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(torch.from_numpy(weights[name]), parameter.detach(), rtol=1e-4, atol=1e-5)
        assert (weights[name] == same[name]).all()
