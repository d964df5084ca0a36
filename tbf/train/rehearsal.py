"""One step at the largest shape of a run before its first, so that a want of memory shows in the first minute."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from tbf.config import RunConfig
from tbf.planning.plan import largest_shape, most_loops
from tbf.train.rng import capture_rng, restore_rng

_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


def rehearse(engine: Any, run: RunConfig, device: torch.device) -> float:
    """Forward, backward and a step that DeepSpeed skips, on random rows; returns the seconds. Collective.

    The loss is made NaN, so the engine finds an invalid gradient norm and leaves weights and moments as they are on
    every rank; its counters and the random generators are put back. The second micro-batch of an accumulating run is
    rehearsed too: gradients of the first one wait beside it.
    """
    started, before = time.perf_counter(), capture_rng()
    counters = {name: getattr(engine, name) for name in _COUNTERS}
    batch = {name: tensor.to(device) for name, tensor in largest_batch(run).items()}
    passes = min(run.train.gradient_accumulation_steps, 2)
    engine.train()
    for number in range(1, passes + 1):
        engine.set_gradient_accumulation_boundary(number == passes)
        output = engine(**batch, loss_denominator=1.0, num_loops=most_loops(run))
        engine.backward(output.loss * math.nan)
    engine.step()
    applied = engine.was_step_applied()
    engine.set_gradient_accumulation_boundary(None)  # back to the engine's own count of micro-steps
    for name, value in counters.items():
        setattr(engine, name, value)
    restore_rng(before)
    if applied:
        raise RuntimeError("DeepSpeed applied a step with NaN gradients; tbf needs deepspeed 0.19.8 or newer")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def largest_batch(run: RunConfig) -> dict[str, torch.Tensor]:
    """Random rows of two documents each, as large as any of the run: ids [B, T], slots [B, M]."""
    shape, generator = largest_shape(run), torch.Generator().manual_seed(0)
    ids = torch.randint(run.model.vocab_size, (shape.rows, shape.tokens), generator=generator)
    segments = torch.ones_like(ids)
    segments[:, shape.tokens // 2 :] = 2
    positions = torch.arange(shape.slots).expand(shape.rows, -1).contiguous()
    return {"input_ids": ids, "segment_ids": segments, "masked_positions": positions,
            "masked_labels": ids.gather(1, positions)}  # fmt: skip
