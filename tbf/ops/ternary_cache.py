"""Ternary weights kept from one optimizer step to the next: one quantisation per weight and step, however many loops,
integrator stages, micro-batches and recomputations use it.

`Parameter._version` can't tell when weights changed: under ZeRO the engine writes them through flat buffers and it
stays 0 for ever. So a process-wide epoch is counted up by a hook that torch calls after every optimizer step, inside
engine.step and before the engine has copied the new weights back; the next forward quantises. Whoever writes weights
in another way (loading a checkpoint, swapping in averaged weights) calls `invalidate_ternary`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from tbf.errors import ConfigError
from tbf.ops.ternary_backends import TernaryWeight


class WeightEpoch:
    """Counts the moments at which any weight of the process may have changed."""

    def __init__(self) -> None:
        self.value = 0

    def advance(self, *_: object) -> None:
        self.value += 1


# The one piece of process-wide state: optimizers don't know which layers they update.
EPOCH = WeightEpoch()
register_optimizer_step_post_hook(EPOCH.advance)


def invalidate_ternary() -> None:
    """Tells every ternary layer that weights were changed by something other than an optimizer step."""
    EPOCH.advance()


class TernaryCache:
    """What one weight was last turned into, one TernaryWeight per matrix in it.

    A plain attribute of its module: in no state dict, copied empty.
    `quantisations` counts how often it was filled. With TBF_CHECK_CACHE=N every N-th hit is compared with the weight as
    it is now, and a difference raises RuntimeError.
    """

    def __init__(self) -> None:
        self.quantisations = 0
        self._hits = 0
        self._key: tuple = ()
        self._prepared: list[TernaryWeight] | None = None

    def get(self, weight: Tensor, settings: object, prepare: Callable[[], list[TernaryWeight]]) -> list[TernaryWeight]:
        """Returns `prepare()` of the current weights, from memory when neither they nor `settings` changed."""
        version = 0 if weight.is_inference() else weight._version
        key = (EPOCH.value, version, weight.device, weight.dtype, tuple(weight.shape), settings)
        if self._prepared is not None and key == self._key:
            self._hits += 1
            every = check_interval()
            if every and self._hits % every == 0:
                self._check(prepare)
            return self._prepared
        # Kept tensors serve training as well, so they must not be born as inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            self._prepared = prepare()
        self._key = key
        self.quantisations += 1
        return self._prepared

    def _check(self, prepare: Callable[[], list[TernaryWeight]]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            fresh = prepare()
        if not all(map(_same, fresh, self._prepared)):
            raise RuntimeError(
                "TBF_CHECK_CACHE: a weight changed without an optimizer step; call tbf.model.bitlinear."
                "invalidate_ternary() after writing weights"
            )

    def __deepcopy__(self, memo: dict) -> TernaryCache:
        return TernaryCache()

    def __reduce__(self) -> tuple:
        return TernaryCache, ()


def check_interval() -> int:
    """TBF_CHECK_CACHE: after how many hits a cached weight is checked; 0 is never. Raises ConfigError."""
    text = os.environ.get("TBF_CHECK_CACHE", "0")
    if not text.isdigit():
        raise ConfigError(f"TBF_CHECK_CACHE: expected a whole number of hits between checks (0: never), got '{text}'")
    return int(text)


def _same(a: TernaryWeight, b: TernaryWeight) -> bool:
    pairs = zip([*a.forward, a.backward], [*b.forward, b.backward], strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and torch.equal(a.scales.nan_to_num(), b.scales.nan_to_num())
