"""Every shipped ds_config, and every ZeRO stage with and without offload, through the real engine."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tbf.config import load_run_config
from tests.helpers.gloo import deepspeed_on_gloo, needs_libaio, run_distributed
from tests.helpers.runs import TINY

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
SHIPPED = sorted(path.name for path in FOLDER.glob("*.json"))
ON_HOST = {"device": "cpu"}
ZERO = [
    {"stage": stage, **({"offload_optimizer": ON_HOST} if offload else {})} for stage in (1, 2, 3) for offload in (0, 1)
] + [{"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST}]
ROWS, TOKENS, VOCABULARY = 4, 24, 64


def losses(
    rank: int, world_size: int, ds_configs: list[str], changes: list[str], steps: int, fused: bool = False
) -> list[list[float]]:
    """The losses of the same steps under each config; every rank sees its share of the same rows. `fused`: by
    DeepSpeed's host Adam, which may have to be compiled, instead of torch's."""
    deepspeed_on_gloo()
    from tbf.model.bitlinear import invalidate_ternary
    from tbf.train.build_ops import prepare_ops
    from tbf.train.ds_config import load_ds_config
    from tbf.train.ds_keys import nvme_folders
    from tbf.train.run import build_engine

    results = []
    for path in ds_configs:
        run = load_run_config("mini", [*(f"model.{k}={v}" for k, v in TINY["model"].items()), *changes])
        config, run = load_ds_config(path, run, world_size)
        config.config["optimizer"]["params"]["torch_adam"] = not fused
        if fused:
            prepare_ops(True, lambda text: None, needs_async_io=bool(nvme_folders(config.config)))
        engine = build_engine(run, config, torch.device("cpu"), lambda text: None)
        engine.train()
        accumulation, rows = run.train.gradient_accumulation_steps, run.train.micro_batch_size
        losses_of_run = []
        for step in range(steps):
            total = 0.0
            for micro in range(accumulation):
                first = (micro * world_size + rank) * rows
                output = engine(**_rows(step, first, rows))
                engine.backward(output.loss)
                engine.step()
                total += output.loss.item() / accumulation
            mean = torch.tensor(total) / world_size
            torch.distributed.all_reduce(mean)
            losses_of_run.append(mean.item())
        results.append(losses_of_run)
        kinds = {x.dtype for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() > 1}
        assert not kinds & {torch.float16, torch.bfloat16}, f"{path}: the engine holds 16-bit tensors"
        for folder in nvme_folders(config.config):
            assert sum(path.stat().st_size for path in folder.rglob("*.swp")) > 1e6, "nothing went to the disk"
        engine.destroy()
        invalidate_ternary()
    return results


def _rows(step: int, first: int, count: int) -> dict[str, Any]:
    """`count` rows of this step's eight, from row `first`."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, VOCABULARY, (8, TOKENS), generator=generator)[first : first + count]
    places = torch.arange(0, TOKENS, 3).expand(count, -1)
    return {"input_ids": ids, "masked_positions": places, "masked_labels": ids.gather(1, places)}


def _write(folder: Path, zero: dict[str, Any], **keys: Any) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"zero_optimization": zero, **keys}))
    return str(path)


def _settings(rows: int = ROWS, accumulation: int = 1, ternary: bool = False) -> list[str]:
    return [
        f"model.use_bitnet={str(ternary).lower()}",
        f"model.vocab_size={VOCABULARY}",
        f"train.micro_batch_size={rows}",
        f"train.gradient_accumulation_steps={accumulation}",
        "train.learning_rate=0.003",
    ]


def test_every_shipped_config_steps(tmp_path):
    names, paths = [], []
    for name in SHIPPED:
        config = json.loads((FOLDER / name).read_text())
        if "nvme" in name:
            continue  # below
        names.append(name)
        paths.append(_write(tmp_path, config.pop("zero_optimization"), **config))
    [results] = run_distributed(losses, 1, paths, _settings(ternary=True), 3)
    assert len(results) >= 5
    for name, found in zip(names, results):
        assert found == pytest.approx(results[0], rel=1e-5), name
        assert all(0 < loss < 10 for loss in found), name


@pytest.mark.slow  # compiles DeepSpeed's async_io once
@needs_libaio
def test_nvme_offload_takes_steps(tmp_path):
    """On a model whose weights and moments are large enough for DeepSpeed to move: from a megabyte on."""
    paths, changes = [str(FOLDER / "p40_zero3.json")], [*_settings(), "model.hidden_size=256"]
    for places in (["offload_param"], ["offload_param", "offload_optimizer"]):
        config = json.loads((FOLDER / "p40_zero3_nvme.json").read_text())
        zero = config.pop("zero_optimization") | {"stage3_param_persistence_threshold": 10_000}
        zero["sub_group_size"] = 500_000  # several groups, as a large model has: pipelining needs more buffers then
        zero |= {place: {**zero[place], "nvme_path": str(tmp_path)} for place in places}
        zero["offload_param"]["max_in_cpu"] = 0  # else a small model's weights never leave host memory
        if "offload_optimizer" not in places:
            zero["offload_optimizer"] = ON_HOST
        paths.append(_write(tmp_path, zero, **config))
    [(sibling, weights, everything)] = run_distributed(losses, 1, paths, changes, 3, True, timeout_s=900)
    assert weights == pytest.approx(sibling, rel=1e-5)
    assert everything == pytest.approx(sibling, rel=1e-5) and everything[-1] < everything[0]


@pytest.mark.slow
def test_stages_offload_ranks_and_accumulation_take_the_same_steps(tmp_path):
    """FP32 linears, so that nothing but the order of sums differs: 20 steps, equal to 1e-5."""
    paths = [_write(tmp_path, zero) for zero in ZERO]
    one = run_distributed(losses, 1, paths, _settings(rows=8), 20)[0]
    two = run_distributed(losses, 2, paths, _settings(rows=4), 20)[0]
    many = run_distributed(losses, 1, paths[:4], _settings(rows=1, accumulation=8), 20)[0]
    for found in [*one, *two, *many]:
        assert found == pytest.approx(one[0], rel=1e-5)
    assert one[0][-1] < one[0][0]
