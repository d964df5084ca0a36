"""What a callback can see and when it is called."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbf.checkpoints import ranks
from tbf.errors import TbfError

logger = logging.getLogger(__name__)


@dataclass
class StepMetrics:
    """One optimizer step, over all ranks."""

    step: int
    """Steps taken, this one included."""
    epoch: float
    tokens: int
    """Tokens read since the start of the run, padding excluded."""
    loss: float
    """Masked cross-entropy, nats per masked token."""
    masked_accuracy: float
    """Share of the masked tokens predicted right, 0 to 1."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_s: float
    mfu: float
    """Share of the cards' peak arithmetic; NaN where the peak is not known."""
    device_mem_gb: float
    host_mem_gb: float
    """Resident memory of rank 0, GB (1e9 bytes), like device_mem_gb."""
    data_wait: float
    """Share of the step's time spent waiting for data, 0 to 1."""
    skipped: int
    """Steps of this run so far whose update was not applied."""
    eta_s: float
    """Seconds left."""
    card_temperature_c: float = math.nan
    """Of rank 0's card, like the next two; NaN without NVML."""
    card_power_w: float = math.nan
    card_clock_mhz: float = math.nan
    loops: int = 1
    """Times that the layers were visited in this step."""
    expert_share_min: float = math.nan
    """Smallest share of its router's assignments that an expert got, over all layers and loops; even is 1 / experts.
    This and the next five are NaN for a model without experts."""
    expert_share_max: float = math.nan
    router_entropy: float = math.nan
    """Nats, mean over tokens, layers and loops; ln(experts) is undecided."""
    router_balance: float = math.nan
    """Balance loss before its coefficient; 1 is even, num_experts / top_k_experts is collapse."""
    router_z: float = math.nan
    """Z loss before its coefficient."""
    router_dropped: float = math.nan
    """Assignments that no expert computed: always 0."""


class Callback:
    """Something that happens around training. Hooks do nothing unless overridden.

    A hook without `monitor` runs on every rank and may use collectives.
    """

    monitor = False
    """True for what only watches (on rank 0): an error in one is reported, and training goes on."""

    def on_start(self, trainer: Any) -> None:
        """Before the first step, with everything restored."""

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        """After each optimizer step."""

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        """After an evaluation; `metrics` has val_loss (nats) and val_masked_accuracy."""

    def on_checkpoint(self, trainer: Any, path: Path, step: int) -> None:
        """After a checkpoint is complete on the disk."""

    def on_rollback(self, trainer: Any) -> None:
        """After the run went back: `trainer` stands at the restored step, whose successors will be taken again."""

    def on_end(self, trainer: Any, status: str) -> None:
        """At the end: "done", "stopped" (asked to), "halted" (by the guard) or "failed"."""


class CallbackList(Callback):
    """Calls its callbacks in order, and from last to first at the end."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)
        self._reported: set[str] = set()

    def on_start(self, trainer: Any) -> None:
        """Monitors first, so that they see what the others do; one that cannot start stops all ranks together."""
        with ranks.together("cannot start"):
            for callback in self.callbacks:
                if callback.monitor:
                    callback.on_start(trainer)
        for callback in self.callbacks:
            if not callback.monitor:
                callback.on_start(trainer)

    def on_step(self, trainer: Any, metrics: StepMetrics) -> None:
        self._each(lambda callback: callback.on_step(trainer, metrics))

    def on_eval(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda callback: callback.on_eval(trainer, step, metrics))

    def on_checkpoint(self, trainer: Any, path: Path, step: int) -> None:
        self._each(lambda callback: callback.on_checkpoint(trainer, path, step))

    def on_rollback(self, trainer: Any) -> None:
        self._each(lambda callback: callback.on_rollback(trainer))

    def on_end(self, trainer: Any, status: str) -> None:
        """Every callback is told; after an error, as "failed". Raises the first error of a run that ended well."""
        first: TbfError | None = None
        for callback in reversed(self.callbacks):
            try:
                self._call(callback, lambda callback, status=status: callback.on_end(trainer, status))
            except TbfError as error:
                if status not in ("done", "stopped"):
                    logger.error("at the end of a run that %s: %s", status, error)
                    continue
                first, status = error, "failed"
        if first is not None:
            raise first

    def _each(self, hook: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            self._call(callback, hook)

    def _call(self, callback: Callback, hook: Callable[[Callback], None]) -> None:
        try:
            hook(callback)
        except Exception as error:
            if not callback.monitor:
                raise
            text = f"{type(callback).__name__}: {error}"
            if text not in self._reported:
                self._reported.add(text)
                logger.warning("%s (training goes on; further ones like it are not shown)", text)
