"""What the routers of a model with experts did in one optimizer step.

Shapes: `L` loops that have a bias of their own, `N` layers, `E` experts.
"""

from __future__ import annotations

import torch
from torch import nn

from tbf.model.config import UltraConfig
from tbf.model.moe import update_router_biases
from tbf.train.distributed import sum_over_ranks

_MEANS = ("balance", "z", "entropy", "dropped")


class RoutingTotals:
    """Sums over micro-batches, then over ranks. Does nothing for a dense model."""

    def __init__(self, config: UltraConfig, device: torch.device) -> None:
        self.active = config.use_moe
        shape = (config.num_loops, config.num_layers, config.num_experts)
        self._load = torch.zeros(shape, dtype=torch.float64, device=device)  # [L, N, E] assignments
        self._means = torch.zeros(len(_MEANS) + 1, dtype=torch.float64, device=device)  # and the number of passes

    def add(self, router: dict[str, torch.Tensor] | None) -> None:
        """Takes the statistics that one forward pass of the model returned."""
        if not self.active:
            return
        load = router["load"].detach()  # [loops of this pass, N, E]
        own = min(len(load), len(self._load))
        self._load[:own] += load[:own]
        self._load[-1] += load[own:].sum(0)  # further loops chose with the last one's bias
        self._means += torch.stack([*(router[name].detach().mean() for name in _MEANS), load.new_ones(())])

    def reduce(self) -> None:
        """Adds up the ranks. Collective; call once, after the last micro-batch."""
        if self.active:
            sum_over_ranks(self._load)
            sum_over_ranks(self._means)

    def update_biases(self, model: nn.Module) -> None:
        """Moves the selection bias of every expert towards balance, alike on all ranks (only with router_aux_free)."""
        if self.active:
            update_router_biases(model, self._load)

    def metrics(self) -> dict[str, float]:
        """The router fields of StepMetrics; none for a dense model."""
        if not self.active:
            return {}
        visited = self._load[self._load.sum(-1) > 0]
        shares = visited / visited.sum(-1, keepdim=True)  # [visits, E]
        balance, z, entropy, dropped = (self._means[:-1] / self._means[-1]).tolist()
        return {
            "expert_share_min": shares.min().item(),
            "expert_share_max": shares.max().item(),
            "router_entropy": entropy,
            "router_balance": balance,
            "router_z": z,
            "router_dropped": dropped,
        }
