"""One quantisation per weight and optimizer step, and never a stale one."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tbf.errors import ConfigError
from tbf.model.bitlinear import BitLinear, invalidate_ternary
from tests.helpers.gloo import run_distributed

STEPS, MICRO_STEPS, LOOPS, LAYERS = 3, 2, 2, 3


class Looped(nn.Module):
    """Layers visited twice, each visit recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BitLinear(16, 16, sub_norm=True) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LOOPS):
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()

    def quantisations(self) -> list[int]:
        return [layer.ternary_cache.quantisations for layer in self.layers]


def train(rank: int, world_size: int, stage: int, offload: bool, cached: bool, folder: str) -> tuple[list[float], list]:
    """Losses of some steps through the engine, then of a step repeated from a checkpoint; and the counts before it."""
    from tests.helpers.gloo import deepspeed_on_gloo

    deepspeed = deepspeed_on_gloo()
    torch.manual_seed(0)
    model = Looped()
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": MICRO_STEPS,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    generator = torch.Generator().manual_seed(rank)
    losses = []

    def step(x: Tensor) -> None:
        for micro in x.unbind():
            if not cached:
                invalidate_ternary()
            loss = engine(micro)
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()

    for i in range(STEPS):
        step(torch.randn(MICRO_STEPS, 4, 16, generator=generator))
        if i == 0:
            engine.save_checkpoint(folder, tag="first")
    counts = model.quantisations()
    again = torch.randn(MICRO_STEPS, 4, 16, generator=torch.Generator().manual_seed(9))
    engine.load_checkpoint(folder, tag="first")
    invalidate_ternary()
    step(again)
    engine.load_checkpoint(folder, tag="first")
    invalidate_ternary()
    step(again)
    return losses, counts


def all_cases(rank: int, world_size: int, cases: list[tuple[int, bool]], folder: str) -> list:
    return [
        [train(rank, world_size, *case, cached, f"{folder}/{case}{cached}") for cached in (True, False)]
        for case in cases
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_through_the_engine(world_size, tmp_path, monkeypatch):
    monkeypatch.setenv("TBF_CHECK_CACHE", "1")  # every hit is compared with the weight as it is
    monkeypatch.setenv("TBF_KERNEL", "cpu_int8")
    cases = [(1, False), (2, True), (3, True)] if world_size == 1 else [(3, False)]
    for results in run_distributed(all_cases, world_size, cases, str(tmp_path)):
        for (losses, counts), (uncached_losses, uncached_counts) in results:
            assert counts == [STEPS] * LAYERS
            assert losses == uncached_losses and min(uncached_counts) > STEPS
            assert len(set(losses[: STEPS * MICRO_STEPS])) == STEPS * MICRO_STEPS
            assert losses[-MICRO_STEPS:] == losses[-2 * MICRO_STEPS : -MICRO_STEPS]  # the checkpoint came back


def test_torch_optimizers_and_plain_writes_are_seen(monkeypatch):
    monkeypatch.setenv("TBF_CHECK_CACHE", "1")
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    for optimizer in (torch.optim.SGD(layer.parameters(), lr=1.0), torch.optim.AdamW(layer.parameters(), lr=1.0)):
        before = layer(x)
        before.sum().backward()
        optimizer.step()
        assert not torch.equal(layer(x), before)
    with torch.no_grad():
        layer.weight.neg_()
    after = layer(x)
    layer.load_state_dict({"weight": -layer.weight})
    assert torch.equal(layer(x), -after)
    assert layer.ternary_cache.quantisations == 5


def test_invisible_writes_need_a_word(monkeypatch):
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    before = layer(x)
    layer.weight.data.neg_()
    monkeypatch.setenv("TBF_CHECK_CACHE", "2")
    assert torch.equal(layer(x), before)  # stale, and not looked at yet
    with pytest.raises(RuntimeError, match="after writing weights"):
        layer(x)
    invalidate_ternary()
    assert torch.equal(layer(x), -before)


def test_check_interval_must_be_a_number(monkeypatch):
    monkeypatch.setenv("TBF_CHECK_CACHE", "often")
    layer = BitLinear(8, 4)
    layer(torch.randn(3, 8))
    with pytest.raises(ConfigError, match="TBF_CHECK_CACHE: expected a whole number"):
        layer(torch.randn(3, 8))


def test_weights_with_nan_pass_the_check(monkeypatch):
    monkeypatch.setenv("TBF_CHECK_CACHE", "1")
    layer = BitLinear(8, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    assert layer(torch.randn(3, 8)).isnan().all() and layer(torch.randn(3, 8)).isnan().all()


def test_cache_from_inference_mode_serves_training():
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    with torch.inference_mode():
        y = layer(x)
    loss = layer(x).sum()
    loss.backward()
    assert layer.weight.grad is not None and layer.ternary_cache.quantisations == 1
    assert torch.equal(y, layer(x))


def test_a_step_between_forward_and_backward_keeps_the_old_weights():
    layer, x = BitLinear(8, 4), torch.randn(3, 8, requires_grad=True)
    twin = copy.deepcopy(layer)
    y = layer(x)
    with torch.no_grad():
        layer.weight.normal_()
    layer(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(twin(x).sum(), x)[0])


def test_copies_start_empty_and_the_state_dict_holds_no_cache():
    layer = BitLinear(8, 4, sub_norm=True)
    layer(torch.randn(3, 8))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.ternary_cache.quantisations == 0
        with torch.no_grad():
            twin.weight.neg_()
        x = torch.randn(3, 8)
        assert torch.equal(twin(x), -layer(x))
    assert set(layer.state_dict()) == {"weight", "sub_norm"}
