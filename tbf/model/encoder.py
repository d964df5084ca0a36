"""The encoder: embeddings, a stack of layers visited several times, a sparse masked-language-model head.

Shapes: `B` batch, `T` tokens, `D` hidden, `M` masked slots per row, `V` vocabulary, `L` loops.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tbf.errors import ConfigError, nearest
from tbf.model.config import UltraConfig
from tbf.model.embeddings import Embeddings
from tbf.model.heads import MaskedLMHead, dense_to_slots, gather_positions, masked_lm_loss, pool
from tbf.model.init import init_weights
from tbf.model.layer import HybridLayer
from tbf.model.mixers.ode_attention import OdeAttention
from tbf.model.norms import RMSNorm, rms
from tbf.model.outputs import EncoderOutput
from tbf.model.segment_info import SegmentInfo

CHECKPOINT_MODES = ("none", "layer", "loop")
MINI_SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "num_layers": 6,
    "num_loops": 2,
    "num_heads": 6,
    "retention_heads": 6,
    "norm_type": "derf",
    "factorized_embedding_dim": 128,
    "titan_memory": "none",
}

RouterStats = dict[str, Tensor] | None


class LoopStart(nn.Module):
    """The state that loop l starts from: RMS(x) + a_l x0 + t_l (input injection as in 2502.05171; x = 0 before loop 0).

    It brings the residual stream back to a known scale, which point-wise norms rely on.
    """

    no_weight_decay = frozenset({"inject", "shift"})

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        self.loops, self.eps = config.num_loops, config.norm_eps
        self.inject = nn.Parameter(torch.ones(config.num_loops, config.hidden_size))  # [L, D]
        self.shift = nn.Parameter(torch.zeros(config.num_loops, config.hidden_size))  # [L, D]

    def forward(self, x: Tensor | None, x0: Tensor, loop: int) -> Tensor:
        """x [B, T, D] or None before the first loop, x0 [B, T, D] -> [B, T, D]."""
        row = min(loop, self.loops - 1)
        start = torch.addcmul(self.shift[row], self.inject[row], x0)
        return start if x is None else start + rms(x, self.eps)


class TormentedBertFrankenstein(nn.Module):
    """Hybrid looped encoder for masked language modelling. Weights come from PyTorch's default generator."""

    def __init__(self, config: UltraConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.loop_start = LoopStart(config)
        self.layers = nn.ModuleList(HybridLayer(config, name, window) for name, window in config.layer_types)
        self.final_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = MaskedLMHead(config)
        self.checkpointing, self.checkpoints_on_host = "none", False
        self.fast: Callable[[Tensor, Tensor, int], Tensor] | None = None  # see tbf.model.fast
        init_weights(self, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        masked_labels: Tensor | None = None,
        loss_denominator: Tensor | float | None = None,
        num_loops: int | None = None,
    ) -> EncoderOutput:
        """Encodes a batch of rows and, given labels, predicts the masked tokens.

        input_ids: [B, T] integer.
        attention_mask: [B, T], 1 at tokens and 0 at padding; one document per row, without holes.
        segment_ids: [B, T], 0 at padding, documents numbered 1, 2, ... in row order; instead of `attention_mask`.
        labels: [B, T] with -100 where nothing is predicted; convenient, but waits for the device.
        masked_positions, masked_labels: [B, M] predicted positions and their tokens; label -100 marks an empty slot.
        loss_denominator: what the summed cross entropy is divided by; None: the number of filled slots.
        num_loops: None: the configured number; other values reuse the last loop's own parameters.

        Raises ConfigError when both or half of a way to give labels is used, or num_loops is below 1.
        """
        segments = _segments(input_ids, attention_mask, segment_ids)
        if labels is not None:
            if masked_positions is not None:
                raise ConfigError("forward got labels and masked_positions; give one of them")
            masked_positions, masked_labels = dense_to_slots(labels)
        hidden, router = self._encode(input_ids, segments, self.config.num_loops if num_loops is None else num_loops)
        output = EncoderOutput(hidden, pool(hidden, segments > 0, self.config.pooling), router=router)
        if masked_positions is None:
            return output
        if masked_labels is None:
            raise ConfigError("forward got masked_positions without masked_labels; give both")
        logits = self.predict(gather_positions(hidden, masked_positions))  # [B, M, V]
        mlm_loss, correct = masked_lm_loss(logits, masked_labels, loss_denominator)
        loss = self.with_router_losses(mlm_loss, router)
        return output._replace(logits=logits, loss=loss, mlm_loss=mlm_loss.detach(), masked_correct=correct)

    def predict(self, hidden: Tensor) -> Tensor:
        """hidden [..., D], rows of `last_hidden_state` -> logits [..., V] over the real vocabulary."""
        return self.head(hidden, self.embeddings.table)

    def with_router_losses(self, loss: Tensor, router: RouterStats) -> Tensor:
        """Adds the weighted losses of the routers, where the model has some; all scalars."""
        if router is None:
            return loss
        return loss + self.config.router_balance_coef * router["balance"] + self.config.router_z_coef * router["z"]

    def set_activation_checkpointing(self, mode: str, *, on_host: bool = False) -> None:
        """Trades compute for memory: `none`, `layer` (keep the input of each layer visit) or `loop` (keep the input of
        each loop and, while going backward through one, of its layers: least memory, one more forward).

        on_host: what is kept from forward to backward waits in host RAM, pinned if it comes from a card.

        Raises ConfigError for another mode, and for `on_host` when nothing is recomputed.
        """
        if mode not in CHECKPOINT_MODES:
            raise ConfigError(f"activation checkpointing is '{mode}'; {nearest(mode, CHECKPOINT_MODES)}")
        if on_host and mode == "none":
            raise ConfigError("activations wait in host RAM only where they are recomputed; choose layer or loop")
        self.checkpointing, self.checkpoints_on_host = mode, on_host
        for module in self.modules():
            if isinstance(module, OdeAttention):  # a single step is what the layer's checkpoint recomputes anyway
                module.checkpoint_steps = mode != "none" and module.steps > 1

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _encode(self, input_ids: Tensor, segments: Tensor, num_loops: int) -> tuple[Tensor, RouterStats]:
        """input_ids, segments [B, T] -> (hidden [B, T, D], router statistics over all visits)."""
        if num_loops < 1:
            raise ConfigError(f"num_loops is {num_loops}; it must be at least 1")
        if self.fast is not None:
            return self.fast(input_ids, segments, num_loops), None
        info = SegmentInfo.build(self.config, segments)
        x0 = self.embeddings(input_ids, segments)
        x, visits = None, []
        for loop in range(num_loops):
            chosen: list[list[Tensor]] = [[] for _ in self.layers]  # made here, so that recomputations find it
            # bound, not passed: every loop would keep a copy of it on the host
            run = partial(self._run_loop, x0, chosen)
            x, stats = self._recomputed(run, x, info, loop, active=self.checkpointing == "loop", outermost=True)
            visits.append(stats)
        return self.final_norm(x), _merge(visits)

    def _run_loop(
        self, x0: Tensor, chosen: list[list[Tensor]], x: Tensor | None, info: SegmentInfo, loop: int
    ) -> tuple[Tensor, list[RouterStats]]:
        """One pass over the layers: [B, T, D] -> ([B, T, D], router statistics of each layer).

        chosen: a list for each layer, where its experts are remembered.
        """
        active, outermost, stats = self.checkpointing != "none", self.checkpointing == "layer", []
        for layer, memo in zip(self.layers, chosen, strict=True):
            visit = partial(layer, chosen=memo) if stats else partial(self._first_visit, x0, memo)
            x, layer_stats = self._recomputed(visit, x, info, loop, active=active, outermost=outermost)
            stats.append(layer_stats)
        return x, stats

    def _first_visit(
        self, x0: Tensor, chosen: list[Tensor], x: Tensor | None, info: SegmentInfo, loop: int
    ) -> tuple[Tensor, RouterStats]:
        """The loop's start and first layer, recomputed as one: apart, a loop would keep one more state."""
        return self.layers[0](self.loop_start(x, x0, loop), info, loop, chosen)

    def _recomputed(self, function: Any, *args: Any, active: bool, outermost: bool) -> Any:
        """Calls `function`, recomputing its activations in backward if `active`.

        Non-reentrant always: the reentrant kind fires a shared weight's gradient hook once per loop, which breaks
        DeepSpeed's reduction. Only what the outermost region keeps goes to the host: inputs of regions inside one are
        dropped by it, which a copy to the host would undo.
        """
        if not (active and torch.is_grad_enabled()):
            return function(*args)
        on_host = self.checkpoints_on_host and outermost
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if on_host else nullcontext():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)


class TormentedBertMini(TormentedBertFrankenstein):
    """The small encoder: 6 layers of width 384, two loops. Keyword arguments override single fields of its config."""

    def __init__(self, config: UltraConfig | None = None, **changes: Any) -> None:
        super().__init__(config.replace(**changes) if config else UltraConfig(**{**MINI_SHAPE, **changes}))


def _segments(input_ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """Document ids [B, T] from whichever description the caller gave."""
    if segment_ids is not None:
        return segment_ids
    if attention_mask is not None:
        return (attention_mask != 0).to(torch.int64)
    return torch.ones_like(input_ids)


def _merge(visits: list[list[RouterStats]]) -> RouterStats:
    """Router statistics per [loop][layer] -> means of scalars, stacks [loops, layers, ...] of the rest."""
    if visits[0][0] is None:
        return None
    merged = {}
    for key, example in visits[0][0].items():
        stacked = torch.stack([torch.stack([stats[key] for stats in layers]) for layers in visits])
        merged[key] = stacked.mean() if example.ndim == 0 else stacked
    return merged
