"""Run folders of a tiny model with real checkpoints, and exports made without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tbf.config import RunConfig
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.export.stored import StoredTensor
from tbf.export.ternary import packed_slices, packed_tensors
from tbf.export.weights import write_weights
from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein
from tests.helpers.runs import TINY

TEXT = ["El perro ladra en la calle y el gato duerme en casa.", "La capital de España es Madrid.", "Hola, mundo."]
SHAPE: dict[str, Any] = TINY["model"]
STEPS = {2: 1.5, 4: 2.5}
"""Saved steps and the validation losses they are given: the first one is the best, the second the newest."""


def tiny_tokenizer() -> SpanishSPMTokenizer:
    return SpanishSPMTokenizer.train(TEXT, 290)


def tiny_config(tokenizer: SpanishSPMTokenizer, **changes: Any) -> UltraConfig:
    return UltraConfig(vocab_size=tokenizer.vocab_size, **{**SHAPE, **changes})


def tiny_model(tokenizer: SpanishSPMTokenizer, **changes: Any) -> TormentedBertFrankenstein:
    torch.manual_seed(1)
    return TormentedBertFrankenstein(tiny_config(tokenizer, **changes)).eval()


def save_run(rank: int, world_size: int, run_dir: Path, stage: int, config: UltraConfig) -> dict[int, dict]:
    """Trains for a few steps under ZeRO `stage` and saves checkpoints; returns {step: weights of the live model}."""
    import deepspeed

    from tbf.train.checkpoint import CheckpointStore

    torch.manual_seed(0)
    model = TormentedBertFrankenstein(config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    store, live = CheckpointStore(run_dir / "checkpoints"), {}
    for step in range(1, max(STEPS) + 1):
        generator = torch.Generator().manual_seed(10 * step + rank)
        ids = torch.randint(5, config.vocab_size, (2, 12), generator=generator)
        engine.backward(engine(input_ids=ids, masked_positions=ids[:, :3] % 12, masked_labels=ids[:, :3]).loss)
        engine.step()
        if step in STEPS:
            store.save(engine, step, {"step": step, "tokens": 24 * step}, rank, world_size, STEPS[step])
            with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
                live[step] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return live


def save_run_files(run_dir: Path, config: UltraConfig, tokenizer: SpanishSPMTokenizer) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    RunConfig(preset="tiny", model=config).save(run_dir / "config.yaml")
    tokenizer.save_pretrained(run_dir / "tokenizer")
    rows = [f"{step},{10.0 - step},0.1" for step in range(1, 5)]
    (run_dir / "metrics.csv").write_text("\n".join(["step,loss,lr", *rows]) + "\n", encoding="utf-8")


def write_export(folder: Path, tokenizer: SpanishSPMTokenizer, format: str = "safetensors", **changes: Any) -> Path:
    """An export of an untrained model."""
    model = tiny_model(tokenizer, **changes)
    tensors = {n: StoredTensor(value.shape, value.dtype, value.clone) for n, value in model.state_dict().items()}
    if format == "ternary":
        tensors = packed_tensors(tensors, packed_slices(model))
    tokenizer.save_pretrained(folder)
    write_weights(folder, tensors, format)
    model.config.save(folder / "config.json")
    return folder
