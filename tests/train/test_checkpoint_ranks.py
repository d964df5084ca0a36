"""Checkpoints of several ranks, and of DeepSpeed itself under every ZeRO stage."""

import errno
from types import SimpleNamespace

import torch

from tbf.checkpoints import files
from tbf.errors import CheckpointError
from tbf.train.checkpoint import CheckpointStore
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.gloo import deepspeed_on_gloo, run_distributed


def two_ranks(rank, world_size, root):
    engine, store = FakeEngine(rank), CheckpointStore(root)
    torch.manual_seed(100 + rank)
    store.prepare(engine, rank)
    first = store.save(engine, 1, {"step": 1}, rank, world_size)
    drawn = torch.rand(2).tolist()
    second = store.save(engine, 2, {"step": 2}, rank, world_size)
    seen = {"files": sorted(path.name for path in second.iterdir())}

    fresh = FakeEngine(rank)
    fresh.moment = None
    state = CheckpointStore(root).load(fresh, first, rank, world_size)
    assert state == {"step": 1} and fresh.moment[0] == rank
    assert torch.rand(2).tolist() == drawn  # each rank has its own random state back

    errors = []
    write = files.DurableFile.write
    if rank == 1:
        files.DurableFile.write = _full_disk
    try:
        store.save(engine, 3, {}, rank, world_size)
    except CheckpointError as error:
        errors.append(str(error))
    files.DurableFile.write = write

    private = CheckpointStore(root.parent / f"node{rank}")
    try:
        private.save(engine, 1, {}, rank, world_size)
    except CheckpointError as error:
        errors.append(str(error))

    torch.distributed.barrier()
    if rank == 0:
        (second / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    torch.distributed.barrier()
    return seen | {"errors": errors, "fallback": CheckpointStore(root).latest().name}


def _full_disk(handle, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_ranks_agree_on_files_failures_and_fallback(tmp_path):
    first, second = run_distributed(two_ranks, 2, tmp_path / "checkpoints")
    assert first == second
    assert "rng_rank1.pt" in first["files"] and "zero_pp_rank_1_mp_rank_00_optim_states.pt" in first["files"]
    full, private = first["errors"]
    assert "No space left" in full and "on rank 1" in full
    assert "still mounted" in private and "on rank 1" in private
    assert first["fallback"] == "step-00000001"


def in_the_background(rank, world_size, root):
    """Saves beside training on two ranks; then one rank's disk is full, and one run ends without its peer."""
    engine, store = FakeEngine(rank), CheckpointStore(root)
    engine.weight = torch.full((8,), 1.0)
    path = store.save(engine, 1, {"step": 1}, rank, world_size, background=True)
    engine.weight.fill_(7.0)  # training goes on
    engine.moment.fill_(7.0)
    store.finish()
    fresh = FakeEngine(rank)
    state = CheckpointStore(root).load(fresh, path, rank, world_size)
    seen = {"state": state, "weight": fresh.weight[0].item(), "moment": fresh.moment[0].item()}
    write = files.DurableFile.write
    if rank == 1:
        files.DurableFile.write = _full_disk
    store.save(engine, 2, {}, rank, world_size, background=True)
    try:
        store.finish()
    except CheckpointError as error:
        seen["error"] = str(error)
    files.DurableFile.write = write
    seen["left"] = sorted(path.name for path in root.iterdir())
    torch.distributed.barrier()
    store.save(engine, 3, {"step": 3}, rank, world_size, background=True)  # waited for by what comes next
    seen["next"] = store.load(FakeEngine(rank), "latest", rank, world_size)
    store.save(engine, 4, {"step": 4}, rank, world_size, background=True)
    store.let_go()
    torch.distributed.barrier()
    seen["alone"] = CheckpointStore(root).latest().name
    return seen


def test_two_ranks_save_beside_training_and_agree_on_a_failure(tmp_path):
    first, second = run_distributed(in_the_background, 2, tmp_path / "checkpoints")
    assert first["state"] == {"step": 1} and first["weight"] == second["weight"] == 1.0
    assert (first["moment"], second["moment"]) == (0.0, 1.0)
    assert first["error"] == second["error"] and "No space left" in first["error"]
    assert first["left"] == second["left"] == ["best.json", "latest", "step-00000001"]
    assert first["next"] == second["next"] == {"step": 3}
    assert first["alone"] == second["alone"] == "step-00000004"


def tiny_engine(stage, **zero):
    deepspeed = deepspeed_on_gloo()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 32), torch.nn.Linear(32, 16)
    )
    model.config = SimpleNamespace(to_dict=lambda: {"hidden_size": 16})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 10_000,
                "allgather_bucket_size": 10_000,
                **zero,
            },
        },
        dist_init_required=False,
    )
    return engine


def train(engine, steps):
    losses = []
    for _ in range(steps):
        x = torch.randn(2, 16)
        loss = (engine(x) - x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def resume_each_stage(rank, world_size, root):
    report = {}
    for stage in (1, 2, 3):
        engine, folder = tiny_engine(stage), root / str(stage)
        torch.manual_seed(1 + rank)
        train(engine, 3)
        store = CheckpointStore(folder)
        store.save(engine, 3, {"step": 3}, rank, world_size, 1.0, background=stage > 1)
        straight = train(engine, 3)  # beside the save
        store.finish()
        engine = tiny_engine(stage)
        assert CheckpointStore(folder).load(engine, "latest", rank, world_size) == {"step": 3}
        report[stage] = (straight, train(engine, 3))
    return report


def test_a_resumed_engine_continues_bitwise_under_every_zero_stage(tmp_path):
    for report in run_distributed(resume_each_stage, 2, tmp_path):
        for stage in (1, 2, 3):
            straight, resumed = report[stage]
            assert straight == resumed, f"ZeRO-{stage}"
