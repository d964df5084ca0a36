"""Checkpoints of runs on NVMe: bitwise the same run after them, and the very weights in the file."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tbf.train.checkpoint import CheckpointStore
from tbf.train.nvme import align_groups
from tests.helpers.gloo import deepspeed_on_gloo, needs_libaio, run_distributed

WIDTH, LAYERS = 640, 5  # 1.6 MB a layer: swapped; several groups, and one of biases that is too small
ON_HOST = {"device": "cpu"}
HOST = {"weights": False, "optimizer": False}
KINDS = ({}, {"pipeline": False, "max_in_cpu": 10**9}, {"optimizer": False}, {"weights": False}, HOST)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: {"hidden_size": WIDTH})
        self.layers = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def make_engine(folder, pipeline=True, weights=True, optimizer=True, max_in_cpu=0):
    deepspeed = deepspeed_on_gloo()
    from tbf.train.build_ops import prepare_ops

    prepare_ops(True, lambda text: None, needs_async_io=True)
    disk = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 12}
    zero = {
        "stage": 3,
        "sub_group_size": 2 * WIDTH**2,
        "stage3_param_persistence_threshold": 10_000,
        "offload_param": {**disk, "buffer_size": WIDTH**2, "max_in_cpu": max_in_cpu} if weights else ON_HOST,
        "offload_optimizer": {**disk, "pipeline_read": pipeline, "pipeline_write": pipeline} if optimizer else ON_HOST,
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "zero_optimization": zero,
    }
    torch.manual_seed(0)
    model = Model()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == large]} for large in (True, False)]
    align_groups(groups, config, torch.distributed.get_world_size())
    return deepspeed.initialize(model=model, model_parameters=groups, config=config, dist_init_required=False)[0]


def train(engine, steps, rank):
    losses = []
    for step in steps:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = (engine(x) - x.roll(1, dims=1)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights_of(engine):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def save_and_go_on(rank, world_size, folder):
    """Losses after a checkpoint, straight and resumed: on NVMe, from host memory, and to it."""
    store = CheckpointStore(folder / "checkpoints", keep_last=9, fingerprint="f" * 64)
    found = {}
    for number, kind in enumerate(KINDS):
        engine = make_engine(folder, **kind)
        train(engine, range(3), rank)
        path = store.save(engine, 10 * (number + 1), {}, rank, world_size)
        saved = weights_of(engine)
        straight = train(engine, range(3, 6), rank)
        if kind.get("optimizer", True):  # a rollback, into the engine that went on
            store.load(engine, path, rank, world_size)
            found[f"{kind} rolled back"] = (straight, train(engine, range(3, 6), rank))
        engine.destroy()
        found[str(kind)] = (straight, path, saved)
    return found


def go_back_to_the_start(rank, world_size, folder):
    """The first losses; the same after a rollback to a checkpoint from before them, and into a fresh engine."""
    store, engine = CheckpointStore(folder / "checkpoints", fingerprint="f" * 64), make_engine(folder)
    path = store.save(engine, 0, {}, rank, world_size)
    found = [train(engine, range(3), rank)]
    store.load(engine, path, rank, world_size)
    found.append(train(engine, range(3), rank))
    engine.destroy()
    return [*found, resume(rank, world_size, folder, path, {}, range(3))]


def resume(rank, world_size, folder, path, kind, steps=range(3, 6)):
    store = CheckpointStore(folder / "checkpoints", keep_last=9, fingerprint="f" * 64)
    engine = make_engine(folder, **kind)
    store.load(engine, path, rank, world_size)
    return train(engine, steps, rank)


@pytest.mark.slow  # compiles DeepSpeed's async_io once
@needs_libaio
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_on_nvme_resumes_bitwise(tmp_path, world_size):
    from tbf.export.deepspeed_files import DeepSpeedCheckpoint

    ranks = run_distributed(save_and_go_on, world_size, tmp_path, timeout_s=600)
    for kind in KINDS:
        straight, path, saved = ranks[0][str(kind)]
        assert straight == pytest.approx(ranks[0][str(HOST)][0], rel=1e-5), kind  # the disk changes nothing
        written = {name: value.clone() for name, value in DeepSpeedCheckpoint(path).optimizer_values("fp32")}
        assert all(torch.equal(written[name], saved[name]) for name in saved) and len(saved) == 2 * LAYERS, kind
        again = run_distributed(resume, world_size, tmp_path, path, kind, timeout_s=600)
        assert again == [rank[str(kind)][0] for rank in ranks], kind
    for rank in ranks:
        for name, (straight, again, *_) in rank.items():
            if "rolled back" in name:
                assert again == straight, name


@pytest.mark.slow
@needs_libaio
def test_a_run_goes_back_to_before_its_first_update(tmp_path):
    [(straight, again, fresh)] = run_distributed(go_back_to_the_start, 1, tmp_path, timeout_s=600)
    assert again == straight and fresh == straight


@pytest.mark.slow
@needs_libaio
def test_a_run_moves_to_nvme_and_back(tmp_path):
    [found] = run_distributed(save_and_go_on, 1, tmp_path, timeout_s=600)
    for source, target in ((HOST, {}), ({}, HOST)):
        straight, path, _ = found[str(source)]
        [again] = run_distributed(resume, 1, tmp_path, path, target, timeout_s=600)
        assert again == pytest.approx(straight, rel=1e-5)
