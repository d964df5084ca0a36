"""Names the rank that holds up all the others: a slow machine makes every step of the job slow.

Steps take equally long everywhere, since ranks wait for each other; what tells them apart is the time that each spends
by itself, waiting for data and in forward passes. It travels with the sums that every step makes anyway. On a card it
is read from events one step later, when they are long past. Under ZeRO-3 a forward pass waits for other ranks' weights
too, so there only slow data shows.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

logger = logging.getLogger(__name__)

WINDOW = 20
"""Steps over which times are summed before they are judged."""
SLOW = 1.5
"""Times the median of the other ranks."""
_AGAIN = 25  # windows until the same rank is named again


class StragglerWatch:
    """Measures this rank's own time; `judge` gets everyone's. `hosts`: the machine of each rank."""

    def __init__(self, hosts: Sequence[str], device: torch.device) -> None:
        self.hosts = list(hosts)
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sums = [0.0] * len(self.hosts)
        self._steps = 0
        self._named: dict[int, int] = {}
        self._windows = 0

    def waited(self, seconds: float) -> None:
        """Adds time that this rank spent by itself on the host."""
        self._seconds += seconds

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Measures a block without collectives; on a card the time of its kernels."""
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Seconds since the last call. To be called at the start of a step, after a wait for the device."""
        seconds = self._seconds + sum(start.elapsed_time(end) / 1e3 for start, end in self._events)
        self._seconds, self._events = 0.0, []
        return seconds

    def judge(self, seconds: Sequence[float]) -> int | None:
        """Takes every rank's seconds of a step; returns the rank that it names in the log, if any."""
        if len(self.hosts) < 2:
            return None
        self._sums = [total + own for total, own in zip(self._sums, seconds)]
        self._steps += 1
        if self._steps < WINDOW:
            return None
        sums, self._sums, self._steps = self._sums, [0.0] * len(self.hosts), 0
        self._windows += 1
        slowest = max(range(len(sums)), key=sums.__getitem__)
        usual = statistics.median(own for rank, own in enumerate(sums) if rank != slowest)
        if sums[slowest] <= SLOW * usual or self._windows - self._named.get(slowest, -_AGAIN) < _AGAIN:
            return None
        self._named[slowest] = self._windows
        logger.warning(
            "rank %d on %s is slow: %.0f ms a step for its data and forward passes, where the others take %.0f ms; all "
            "wait for it (look at its other processes, its clocks and heat, its disk)",
            slowest, self.hosts[slowest], 1e3 * sums[slowest] / WINDOW, 1e3 * usual / WINDOW,
        )  # fmt: skip
        return slowest
