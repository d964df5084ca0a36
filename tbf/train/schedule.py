"""Learning rate, weight decay, mask rate and loops as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from tbf.config import RunConfig, TrainConfig
from tbf.data.masking import MaskSpec


def learning_rate(step: int, train: TrainConfig) -> float:
    """Warm-up, stable, decay (WSD): linear rise, constant peak, then 1 - sqrt down to `min_lr_ratio` of the peak.

    `step` counts from 0; the 1 - sqrt form is the one of ModernBERT (arXiv 2412.13663) and 2405.18392.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    decay_steps = train.max_steps - decay_start(train)
    left = train.max_steps - step
    if left >= decay_steps or decay_steps == 0:
        return train.learning_rate
    progress = 1.0 - max(left, 0) / decay_steps
    return train.learning_rate * max(train.min_lr_ratio, 1.0 - math.sqrt(progress))


def decay_start(train: TrainConfig) -> int:
    """First step of the decay phase."""
    return train.max_steps - round(train.decay_share * train.max_steps)


def moving_mask(mask: MaskSpec, run: RunConfig, step: int, cursor: int, rows_per_step: int) -> MaskSpec:
    """`mask` with a rate that moves to `data.mask_rate_end` over the steps of the decay phase.

    Its rows are counted from the place of a run that is at `step` and `cursor`, so that a resumed run follows the
    length and the batch size that it is given now, whatever they were before.
    """
    if not run.data.mask_rate_end:
        return mask
    start, end = (cursor + (at - step) * rows_per_step for at in (decay_start(run.train), run.train.max_steps))
    return replace(mask, end_rate=run.data.mask_rate_end, start_row=start, end_row=end)


def weight_decay(step: int, train: TrainConfig) -> float:
    """The decay of matrices; 0 in the second half under the two-stage recipe of BitNet b1.58 (arXiv 2402.17764)."""
    return 0.0 if train.two_stage_weight_decay and 2 * step >= train.max_steps else train.weight_decay


def loop_count(step: int, train: TrainConfig, num_loops: int) -> int:
    """Visits of the layers in a step: `num_loops`, or with `stochastic_loops`, after the warm-up, one less or one more
    in a tenth of the steps each (never below one), so that the model works at depths near its own (Huginn, 2502.05171,
    draws them from a wider distribution).

    Drawn from the seed and the step alone: the same on every rank and when the step is taken again.
    """
    if not train.stochastic_loops or step < train.warmup_steps:
        return num_loops
    draw = random.Random(f"loops {train.seed} {step}").random()
    if draw < 0.1:
        return max(1, num_loops - 1)
    return num_loops + 1 if draw >= 0.9 else num_loops
