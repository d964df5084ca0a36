"""Refuses to train on gradients that DeepSpeed would mix up.

ZeRO fills its reduction buckets in the order in which gradients become ready. When that order differs between ranks
(rank-dependent routing or loop counts) or a parameter reports twice in a backward (reentrant checkpointing of a layer
that is visited twice), buckets are summed across different parameters: wrong gradients, without any message.
"""

from __future__ import annotations

import hashlib

from torch import nn

from tbf.checkpoints import ranks
from tbf.errors import EngineError


class GradientOrderGuard:
    """Watches the first backward passes of a run, then removes itself."""

    def __init__(self, module: nn.Module, passes: int = 3) -> None:
        self.passes = passes
        self._ready: list[str] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._ready.append(name))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    def check(self) -> None:
        """Call after each backward pass. Collective while it watches. Raises EngineError on every rank."""
        if self.passes == 0:
            return
        ready, self._ready = self._ready, []
        twice = next((name for name in ready if ready.count(name) > 1), None) if len(set(ready)) < len(ready) else None
        digests = ranks.gather((hashlib.sha256("\n".join(ready).encode()).hexdigest(), twice))
        for rank, (_, name) in enumerate(digests):
            if name:
                raise EngineError(
                    f"the gradient of {name} was reduced twice in one backward pass (rank {rank}): a layer visited "
                    "more than once must be checkpointed with use_reentrant=False"
                )
        different = [rank for rank, (digest, _) in enumerate(digests) if digest != digests[0][0]]
        if different:
            raise EngineError(
                f"ranks {different} made their gradients ready in another order than rank 0; the model must run the "
                "same layers in the same order on every rank"
            )
        self.passes -= 1
        if self.passes == 0:
            for hook in self._hooks:
                hook.remove()
