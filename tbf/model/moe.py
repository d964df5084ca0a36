"""Feed-forward block with a mixture of experts.

Shapes: `B` batch, `T` tokens, `D` hidden, `F` inner width, `E` experts, `k` experts per token, `N` = B T, `A` = N k,
`L` loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbf.model.config import UltraConfig
from tbf.model.ffn import GATED, PLAIN
from tbf.model.init import linear_std, truncated_normal
from tbf.model.segment_info import SegmentInfo
from tbf.ops.moe_dispatch import Routing, choose_experts, combine, count_experts, dispatch, expert_linear, route
from tbf.ops.ternary import activation_fake_quant, ternary_experts_linear, ternary_fake_quant
from tbf.ops.ternary_backends import TernaryPlan
from tbf.ops.ternary_cache import TernaryCache


class ExpertLinear(nn.Module):
    """A BitLinear per expert, stacked in one `weight` [E, N, D], each with ternary scales of its own.

    `out_features` lists the slices of a fused projection, N their sum. `sub_norm` puts an RMSNorm before quantising,
    with a gain that all experts share. Stacked, an expert without tokens has a zero gradient; as modules, it would have
    none, and ranks that route differently would wait for each other.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: Sequence[int],
        *,
        ternary: bool = True,
        sub_norm: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.slices, self.ternary, self.eps = tuple(out_features), ternary, eps
        self.weight = nn.Parameter(torch.empty(experts, sum(self.slices), in_features))  # [E, N, D]
        self.sub_norm = nn.Parameter(torch.ones(in_features)) if sub_norm else None  # [D]
        self.backend: str | None = None
        """One of `ops.moe_dispatch.BACKENDS`, in floating point. None: the integer kernels if ternary, else the one
        that a trial picks."""
        self.ternary_plan: TernaryPlan | None = None
        self.ternary_cache = TernaryCache()

    @property
    def in_integers(self) -> bool:
        return self.ternary and self.backend is None

    def forward(self, x: Tensor, counts: Tensor | Sequence[int]) -> tuple[Tensor, ...]:
        """x [A, D], sorted by expert, counts [E] rows each -> one [A, N_i] per slice."""
        if self.in_integers:
            return ternary_experts_linear(
                x, self.weight, counts, self.ternary_cache,
                slices=self.slices, gain=self.sub_norm, norm_eps=self.eps, plan=self.ternary_plan,
            )  # fmt: skip
        weight = self.weight
        if self.sub_norm is not None:
            x = F.rms_norm(x, x.shape[-1:], self.sub_norm, self.eps)
        if self.ternary:
            x, weight = activation_fake_quant(x), ternary_fake_quant(weight, self.slices)
        return expert_linear(x, weight, counts, self.backend).split(self.slices, -1)

    def extra_repr(self) -> str:
        experts, _, size = self.weight.shape
        return f"{experts} x {size} -> {self.slices}, ternary={self.ternary}, sub_norm={self.sub_norm is not None}"


class MixtureOfExperts(nn.Module):
    """The sum over a token's top-k experts of gate * down(act(up x)), dropless (2101.03961, 2401.04088).

    The router is FP32, without bias, on the unquantised input. With `router_aux_free` a bias per loop and expert, moved
    once per optimizer step by `update_router_bias`, steers the choice (2408.15664).
    """

    no_weight_decay = frozenset({"router"})

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts, self.top_k, self.loops = config.num_experts, config.top_k_experts, config.num_loops
        self.gated = config.ffn_activation in GATED
        self.activation = (GATED if self.gated else PLAIN)[config.ffn_activation]
        size, inner, ternary = config.hidden_size, config.ffn_size, config.use_bitnet
        self.router = nn.Parameter(torch.empty(self.num_experts, size))  # [E, D]
        self.up_proj = ExpertLinear(self.num_experts, size, (inner, inner) if self.gated else (inner,), ternary=ternary)
        self.down_proj = ExpertLinear(self.num_experts, inner, (size,), ternary=ternary, sub_norm=True)
        bias = torch.zeros(self.loops, self.num_experts) if config.router_aux_free else None
        self.register_buffer("router_bias", bias)  # [L, E]

    def init_parameters(self) -> None:
        truncated_normal(self.router, linear_std(self.config, self.router.shape[1], "router"))
        for name in ("up_proj", "down_proj"):
            weight = getattr(self, name).weight
            truncated_normal(weight, linear_std(self.config, weight.shape[2], name))

    def forward(
        self, u: Tensor, info: SegmentInfo, loop: int = 0, chosen: list[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u [B, T, D], normed -> ([B, T, D], router statistics over real tokens).

        chosen: where the first call leaves its choice of experts [N, k] and a recomputation of it finds it. A tie, or a
        sum in another order on a card, could otherwise send a token elsewhere than its saved activations went.

        balance: E sum_e share_e P_e, share of assignments times mean probability; 1 when balanced, at most E / k.
        z: mean squared logsumexp of the logits (2202.08906).
        entropy: mean entropy of a token's probabilities, in nats.
        load: [E] assignments per expert. dropped: always 0.
        """
        x = u.flatten(0, 1)  # [N, D]
        logits = F.linear(x.float(), self.router.float())  # [N, E]
        probs = logits.softmax(-1)
        bias = None if self.router_bias is None else self.router_bias[min(loop, self.loops - 1)]
        chosen = [] if chosen is None else chosen
        if not chosen:
            chosen.append(choose_experts(probs, self.top_k, bias))
        routing = route(probs, chosen[0])
        counts = self.host_counts(routing)
        up = self.up_proj(dispatch(x, routing), counts)
        inner = self.activation(up[0]) * up[1] if self.gated else self.activation(up[0])  # [A, F]
        (rows,) = self.down_proj(inner, counts)
        stats = router_stats(logits, probs, routing.experts, info.real.flatten())
        return combine(rows, routing).view_as(u), stats

    def host_counts(self, routing: Routing) -> Tensor | list[int]:
        """Rows per expert as the projections want them. The integer kernels are called expert by expert: both
        projections share one wait for the device."""
        return routing.counts.cpu() if self.up_proj.in_integers else routing.counts

    def force_backend(self, backend: str | None) -> None:
        """Computes the experts with one of `ops.moe_dispatch.BACKENDS`; None goes back to the automatic choice."""
        self.up_proj.backend = self.down_proj.backend = backend

    @torch.no_grad()
    def update_router_bias(self, load: Tensor) -> None:
        """Moves the bias of each expert by `router_bias_rate` towards the mean load. load [L, E]: assignments of one
        optimizer step, summed over micro-batches and ranks. Does nothing without `router_aux_free`."""
        if self.router_bias is not None:
            load = load.to(self.router_bias)
            self.router_bias.sub_(self.config.router_bias_rate * torch.sign(load - load.mean(-1, keepdim=True)))


def update_router_biases(model: nn.Module, load: Tensor) -> None:
    """Calls `update_router_bias` of every layer with its part of load [L, layers, E], as the encoder stacks it."""
    for moe, layer_load in zip(_expert_blocks(model), load.unbind(1), strict=True):
        moe.update_router_bias(layer_load)


def _expert_blocks(model: nn.Module) -> Iterator[MixtureOfExperts]:
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
