"""Resuming with other ranks, another ZeRO stage, optimizer class or parameter order: the same run but for rounding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tbf.errors import CheckpointError
from tbf.train.build_ops import prepare_ops
from tbf.train.checkpoint import CheckpointStore
from tests.helpers.gloo import deepspeed_on_gloo, run_distributed

STEPS = 20
OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ROUND_ROBIN = {"round_robin_gradients": True}


class Model(torch.nn.Module):
    """Odd sizes, so that partitions are padded and parameters lie across their borders; a tied weight; a buffer."""

    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(13, 31), torch.nn.Linear(31, 13)
        self.again = torch.nn.Linear(13, 31)
        self.again.weight = self.into.weight
        self.scale = torch.nn.Parameter(torch.ones(7))
        self.register_buffer("seen", torch.zeros(()))
        self.config = SimpleNamespace(to_dict=lambda: {"hidden_size": 13})

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.out(torch.tanh(self.into(x)) + torch.tanh(self.again(x))) * self.scale.mean()


def make_engine(stage, zero, world_size):
    deepspeed = deepspeed_on_gloo()
    prepare_ops(True, lambda text: None)
    torch.manual_seed(0)
    model = Model()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == big]} for big in (True, False)]
    optimizer = {
        "type": "AdamW",
        "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": not zero.get("offload_optimizer")},
    }
    buckets = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, "stage3_param_persistence_threshold": 20}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config={
            "train_micro_batch_size_per_gpu": 4 // world_size,
            "gradient_clipping": 1.0,
            "optimizer": optimizer,
            "zero_optimization": {"stage": stage, **buckets, **zero},
        },
        dist_init_required=False,
    )
    return engine


def train(engine, steps, rank, world_size):
    """Losses over all ranks, on rows that depend on the step alone."""
    losses = []
    for step in steps:
        rows = torch.randn(4, 13, generator=torch.Generator().manual_seed(step))
        x = rows.chunk(world_size)[rank]
        loss = (engine(x) - x.roll(1, dims=1)).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def save_and_go_on(rank, world_size, root, cases):
    straight = {}
    for name, stage, zero in cases:
        engine = make_engine(stage, zero, world_size)
        train(engine, range(5), rank, world_size)
        CheckpointStore(root / name).save(engine, 5, {"step": 5}, rank, world_size)
        straight[name] = train(engine, range(5, 5 + STEPS), rank, world_size)
    return straight


def resume(rank, world_size, root, cases):
    report = []
    for source, stage, zero in cases:
        engine = make_engine(stage, zero, world_size)
        assert CheckpointStore(root / source).load(engine, "latest", rank, world_size) == {"step": 5}
        assert engine.global_steps == 5 and engine.module.seen == 5
        losses = train(engine, range(5, 5 + STEPS), rank, world_size)
        store = CheckpointStore(root / f"{source}-{stage}-{world_size}-{len(report)}")
        again = store.save(engine, 5 + STEPS, {"step": 5 + STEPS}, rank, world_size)  # what it saves can be resumed too
        fresh = make_engine(stage, zero, world_size)
        store.load(fresh, again, rank, world_size)
        more = range(5 + STEPS, 8 + STEPS)
        assert train(engine, more, rank, world_size) == train(fresh, more, rank, world_size)
        report.append(losses)
    return report


SAVED = [("zero1", 1, {}), ("zero2", 2, {}), ("zero3", 3, {}), ("cpu-adam", 2, OFFLOADED)]
TWO_RANKS = [("zero2", 3, {}), ("zero3", 1, {}), ("zero1", 2, ROUND_ROBIN), ("zero2", 2, OFFLOADED)]
ONE_RANK = [("zero2", 2, {}), ("zero3", 3, {}), ("zero1", 3, OFFLOADED), ("cpu-adam", 1, {})]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("reshape")
    return root, run_distributed(save_and_go_on, 2, root, SAVED)[0]


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, TWO_RANKS[:2]), pytest.param(2, TWO_RANKS[2:], marks=pytest.mark.slow),
                         (1, ONE_RANK[:1]), pytest.param(1, ONE_RANK[1:], marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_goes_on_in_another_shape(saved, ranks, cases):
    root, straight = saved
    found = run_distributed(resume, ranks, root, cases)[0]
    for (source, stage, zero), losses in zip(cases, found, strict=True):
        assert losses == pytest.approx(straight[source], abs=1e-5), f"{source} -> ZeRO-{stage} {zero} on {ranks}"
        assert losses[-1] < losses[0]


def before_any_update(rank, world_size, root):
    """Losses of the first steps: straight, and from a checkpoint saved before them, in other shapes."""
    engine, found = make_engine(1, {}, world_size), []
    CheckpointStore(root / "untrained").save(engine, 0, {"step": 0}, rank, world_size)
    for stage, zero in [(1, {}), (2, OFFLOADED), (3, {})]:
        other = make_engine(stage, zero, world_size)
        CheckpointStore(root / "untrained").load(other, "latest", rank, world_size)
        found.append(train(other, range(5), rank, world_size))
    return train(engine, range(5), rank, world_size), found


def test_a_checkpoint_from_before_the_first_update_loads_too(tmp_path):
    [(straight, found)] = run_distributed(before_any_update, 1, tmp_path)
    for losses in found:
        assert losses == pytest.approx(straight, abs=1e-5)


def wrong_model(rank, world_size, root):
    engine = make_engine(2, {}, world_size)
    engine.module.config = SimpleNamespace(to_dict=lambda: {"hidden_size": 14})
    try:
        CheckpointStore(root / "zero3").load(engine, "latest", rank, world_size)
    except CheckpointError as error:
        return str(error)


def test_another_model_is_refused_all_the_same(saved):
    (message,) = run_distributed(wrong_model, 1, saved[0])
    assert "belongs to another model (hidden_size 13 there, 14 here)" in message
