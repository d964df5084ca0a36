"""How numbers are shown to people."""

from __future__ import annotations

import math

from tbf.train.callbacks.base import StepMetrics


def step_line(metrics: StepMetrics, max_steps: int) -> str:
    """One step in one line."""
    return f"step {metrics.step}/{max_steps}  {summary(metrics)}  ETA {duration(metrics.eta_s)}"


def summary(metrics: StepMetrics) -> str:
    skipped = f"  skipped {metrics.skipped}" if metrics.skipped else ""
    experts = ""
    if not math.isnan(metrics.expert_share_max):
        experts = f"  experts {metrics.expert_share_min:.0%}-{metrics.expert_share_max:.0%}"
    return (
        f"loss {metrics.loss:.4f}  masked acc {metrics.masked_accuracy:.1%}  lr {metrics.lr:.2e}  "
        f"{count(metrics.tokens_per_s)} tok/s{experts}{skipped}"
    )


def eval_line(step: int, metrics: dict[str, float]) -> str:
    return f"step {step}  validation: loss {metrics['val_loss']:.4f}  masked acc {metrics['val_masked_accuracy']:.1%}"


def duration(seconds: float) -> str:
    """3 s, 4 m 05 s, 2 h 07 m, 3 d 04 h."""
    if not 0 <= seconds < float("inf"):
        return "?"
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02} h"
    if hours:
        return f"{hours} h {m:02} m"
    return f"{m} m {s:02} s" if minutes else f"{s} s"


def count(value: float) -> str:
    """12, 12.3k, 4.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"
