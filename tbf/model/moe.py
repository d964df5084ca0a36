"""Feed-forward block with a mixture of experts.

Shapes: `B` batch, `T` tokens, `D` hidden, `F` inner width, `E` experts, `k` experts per token, `N` = B T, `A` = N k,
`L` loops.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.config import UltraConfig
from tbf.model.ffn import GATED, PLAIN
from tbf.model.init import linear_std, truncated_normal
from tbf.model.segment_info import SegmentInfo
from tbf.ops.moe_dispatch import Routing, combine, count_experts, dispatch, expert_linear, route
from tbf.ops.ternary import activation_fake_quant, ternary_fake_quant

_SUB_NORM_EPS = 1e-5


class MixtureOfExperts(nn.Module):
    """The sum over a token's top-k experts of gate * down(act(up x)), dropless (2101.03961, 2401.04088).

    The router is FP32, without bias, on the unquantised input. Experts are ternary with a scale each; their down
    projections share one SubLN gain. With `router_aux_free` a bias per expert, moved once per optimizer step by
    `update_router_bias`, steers the choice (2408.15664).
    """

    no_weight_decay = frozenset({"router"})

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts, self.top_k, self.loops = config.num_experts, config.top_k_experts, config.num_loops
        self.gated = config.ffn_activation in GATED
        self.activation = (GATED if self.gated else PLAIN)[config.ffn_activation]
        size, inner = config.hidden_size, config.ffn_size
        self.up_slices = (inner, inner) if self.gated else (inner,)
        self.router = nn.Parameter(torch.empty(self.num_experts, size))  # [E, D]
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, sum(self.up_slices), size))  # [E, F, D]
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, size, inner))  # [E, D, F]
        self.sub_norm = nn.Parameter(torch.ones(inner))  # [F]
        bias = torch.zeros(self.loops, self.num_experts) if config.router_aux_free else None
        self.register_buffer("router_bias", bias)  # [L, E]
        self.backend: str | None = None
        """One of `ops.moe_dispatch.BACKENDS`; None: chosen by a trial."""

    def init_parameters(self) -> None:
        truncated_normal(self.router, linear_std(self.config, self.router.shape[1], "router"))
        truncated_normal(self.up_proj, linear_std(self.config, self.up_proj.shape[2], "up_proj"))
        truncated_normal(self.down_proj, linear_std(self.config, self.down_proj.shape[2], "down_proj"))

    def forward(self, u: Tensor, info: SegmentInfo, loop: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """u [B, T, D], normed -> ([B, T, D], router statistics over real tokens).

        balance: E sum_e share_e P_e, share of assignments times mean probability; 1 when balanced, at most E / k.
        z: mean squared logsumexp of the logits (2202.08906).
        entropy: mean entropy of a token's probabilities, in nats.
        load: [E] assignments per expert. dropped: always 0.
        """
        x = u.flatten(0, 1)  # [N, D]
        logits = F.linear(x.float(), self.router.float())  # [N, E]
        probs = logits.softmax(-1)
        bias = None if self.router_bias is None else self.router_bias[min(loop, self.loops - 1)]
        routing = route(probs, self.top_k, bias)
        return self._experts(x, routing).view_as(u), router_stats(logits, probs, routing.experts, info.real.flatten())

    def _experts(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, D] -> [N, D]."""
        up, down = self.up_proj, self.down_proj
        if self.config.use_bitnet:
            x, up, down = activation_fake_quant(x), ternary_fake_quant(up, self.up_slices), ternary_fake_quant(down)
        inner = expert_linear(dispatch(x, routing), up, routing.counts, self.backend)  # [A, F]
        if self.gated:
            gate, inner = inner.split(self.up_slices, -1)
            inner = self.activation(gate) * inner
        else:
            inner = self.activation(inner)
        inner = F.rms_norm(inner, inner.shape[-1:], self.sub_norm, _SUB_NORM_EPS)
        if self.config.use_bitnet:
            inner = activation_fake_quant(inner)
        return combine(expert_linear(inner, down, routing.counts, self.backend), routing)

    @torch.no_grad()
    def update_router_bias(self, load: Tensor) -> None:
        """Moves the bias of each expert by `router_bias_rate` towards the mean load. load [L, E]: assignments of one
        optimizer step, summed over micro-batches and ranks. Does nothing without `router_aux_free`."""
        if self.router_bias is not None:
            load = load.to(self.router_bias)
            self.router_bias.sub_(self.config.router_bias_rate * torch.sign(load - load.mean(-1, keepdim=True)))

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, top {self.top_k}, {self.config.hidden_size} -> {self.config.ffn_size}"


def update_router_biases(model: nn.Module, load: Tensor) -> None:
    """Calls `update_router_bias` of every layer with its part of load [L, layers, E], as the encoder stacks it."""
    for moe, layer_load in zip(_moe_layers(model), load.unbind(1), strict=True):
        moe.update_router_bias(layer_load)


def _moe_layers(model: nn.Module) -> Iterator[MixtureOfExperts]:
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


def router_stats(logits: Tensor, probs: Tensor, experts: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Losses and statistics of a router where real [N] is true; logits, probs [N, E], experts [N, k]."""
    count = probs.shape[1]
    weight = real.to(probs.dtype) / real.sum().clamp(min=1)  # [N], sums to one
    load = count_experts(experts, count, real).to(probs.dtype)  # [E]
    share = load / load.sum().clamp(min=1)
    return {
        "balance": count * (share * (weight @ probs)).sum(),
        "z": weight @ logits.logsumexp(-1).square(),
        "entropy": (weight @ torch.special.entr(probs.detach())).sum(),
        "load": load,
        "dropped": load.new_zeros(()),
    }
