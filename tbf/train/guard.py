"""Keeps bad steps away from the weights, and says when a run cannot go on like this.

The loss, already summed over the ranks, is judged before the optimizer runs; the gradient norm inside DeepSpeed's own
step, where it is known first and equal on all ranks. A refused step is skipped by DeepSpeed itself, as it skips a non-
finite one: weights and moments stay as they were on every rank. Neither adds a collective or a wait for the device.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tbf.config import TrainConfig

log = logging.getLogger("tbf")

_SIGMA_PER_MAD = 1.4826  # of a normal distribution
_LOSS_FLOOR, _LOG_NORM_FLOOR = 0.02, 0.1  # least sigma: a flat stretch must not make noise look like a spike


class SpikeRule:
    """A value is a spike when it lies `sigmas` robust standard deviations above the median of the last `window` ones.

    Median and median absolute deviation, unlike mean and variance, are not moved by the spikes themselves. Nothing is
    a spike until half a window is known, nor with `sigmas` 0.
    """

    def __init__(self, sigmas: float, window: int, floor: float) -> None:
        self.sigmas, self.floor = sigmas, floor
        self.recent: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """The largest value that is no spike; infinity while too little is known."""
        if self.sigmas == 0 or 2 * len(self.recent) < (self.recent.maxlen or 0):
            return math.inf
        middle = statistics.median(self.recent)
        deviation = statistics.median(abs(value - middle) for value in self.recent)
        return middle + self.sigmas * max(_SIGMA_PER_MAD * deviation, self.floor)


class NormGate:
    """Stands between DeepSpeed's gradient norm and its check, and turns a norm above `limit` into an invalid one.

    DeepSpeed (0.19) has no public place for a verdict on the norm before the update; computing the norm beforehand
    would cost a pass over all gradients and a collective. So the method that returns it is wrapped, on this optimizer
    only: `scaled_global_norm` under ZeRO-1 and -2, `_get_norm_groups` (the norms of its groups) under ZeRO-3.
    """

    def __init__(self, optimizer: Any) -> None:
        self.limit = math.inf
        self.norm: torch.Tensor | float = 0.0
        """Of the last step, before clipping and whatever the verdict."""
        if hasattr(optimizer, "scaled_global_norm"):
            optimizer.scaled_global_norm = self._gated(optimizer.scaled_global_norm)
        else:
            optimizer._get_norm_groups = self._gated(optimizer._get_norm_groups)

    def _gated(self, norms: Callable[..., Any]) -> Callable[..., Any]:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        def gated(*args: Any, **kwargs: Any) -> Any:
            found = norms(*args, **kwargs)
            groups = found if isinstance(found, list) else [found]
            norm = combine_grad_norm_groups(groups) if isinstance(found, list) else found
            self.norm = norm
            passed = [torch.where(norm <= self.limit, group, math.inf) for group in groups]
            return passed if isinstance(found, list) else passed[0]

        return gated


class Guard:
    """Judges every step of a run; equal on all ranks, since it sees only what all ranks agree on."""

    def __init__(self, train: TrainConfig, optimizer: Any) -> None:
        self.train = train
        self.skipped = 0
        """Steps of this run that were not applied."""
        self.rollbacks = 0
        """Rollbacks since the run last got past the place where it failed."""
        self.lr_factor = 1.0
        self.bad_steps: deque[int] = deque()
        """The skipped steps among the last `bad_window`."""
        self.reason = ""
        """Why the last bad step was skipped."""
        self._failed_at = -1
        self._losses = SpikeRule(train.spike_sigmas, train.spike_window, _LOSS_FLOOR)
        self._log_norms = SpikeRule(train.spike_sigmas, train.spike_window, _LOG_NORM_FLOOR)
        self._gate = NormGate(optimizer)
        self._limit = self._norm_limit = math.inf

    def before_update(self, loss: float) -> None:
        """Call with the loss over all ranks before the engine's last `step` of an optimizer step."""
        self._limit = self._losses.limit()
        self._norm_limit = _exp(self._log_norms.limit())
        self._gate.limit = self._norm_limit if math.isfinite(loss) and loss <= self._limit else -math.inf

    def after_update(self, step: int, loss: float, applied: bool) -> float:
        """Takes note of a finished step; returns its gradient norm before clipping (infinite where it was not)."""
        norm = float(self._gate.norm)
        while self.bad_steps and self.bad_steps[0] <= step - self.train.bad_window:
            self.bad_steps.popleft()
        if applied:
            self._losses.recent.append(loss)
            self._log_norms.recent.append(math.log(max(norm, 1e-30)))
            if self.rollbacks and not self.bad_steps and step > self._failed_at:
                self.rollbacks = 0
            return norm
        self.skipped += 1
        self.bad_steps.append(step)
        self.reason = self._explain(loss, norm)
        log.warning(
            "step %d skipped on every rank: %s (%d of the last %d steps; at %d the run goes back)",
            *(step, self.reason, len(self.bad_steps), self.train.bad_window, self.train.max_bad_steps),
        )
        return norm

    @property
    def exhausted(self) -> bool:
        """Whether so many steps were skipped lately that the run must go back."""
        return len(self.bad_steps) >= self.train.max_bad_steps

    @property
    def healthy(self) -> bool:
        """Whether a checkpoint of this moment is one to come back to."""
        return 2 * len(self.bad_steps) < self.train.max_bad_steps

    def rolled_back(self, before: dict[str, Any], failed_at: int) -> None:
        """Call once an earlier state is restored: carries over from the state `before` what must not be forgotten."""
        self.rollbacks = before["rollbacks"] + 1
        self.skipped = before["skipped"]
        self.lr_factor = before["lr_factor"] * self.train.rollback_lr_factor
        self.bad_steps.clear()
        self._failed_at = max(failed_at, before["failed_at"])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists of them."""
        return {
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "lr_factor": self.lr_factor,
            "failed_at": self._failed_at,
            "bad_steps": list(self.bad_steps),
            "losses": list(self._losses.recent),
            "log_norms": list(self._log_norms.recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.rollbacks = state["skipped"], state["rollbacks"]
        self.lr_factor, self._failed_at = state["lr_factor"], state["failed_at"]
        for recent, values in (
            (self.bad_steps, state["bad_steps"]),
            (self._losses.recent, state["losses"]),
            (self._log_norms.recent, state["log_norms"]),
        ):
            _refill(recent, values)

    def _explain(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss {loss}"
        if loss > self._limit:
            return f"loss {loss:.4f} is a spike (limit {self._limit:.4f})"
        if not math.isfinite(norm):
            return f"loss {loss:.4f}, gradient norm {norm}"
        return f"gradient norm {norm:.3g} is a spike (limit {self._norm_limit:.3g})"


def _refill(recent: deque, values: Iterable) -> None:
    recent.clear()
    recent.extend(values)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
