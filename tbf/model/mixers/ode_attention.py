"""Attention as the vector field of an ODE, integrated with a fixed step (ODE Transformer, 2203.09176).

Shapes: `B` batch, `T` tokens, `D` hidden, `S` solver stages, `L` loops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tbf.model.config import UltraConfig
from tbf.model.mixers.softmax_attention import SoftmaxAttention
from tbf.model.norms import rms
from tbf.model.segment_info import SegmentInfo
from tbf.ops.rk4 import integrate

STAGES = {"rk4": 4, "euler": 1}
FIELD_SCALE = 0.1
"""Initial tau: with it the block's gradient gain stays near 1 even when its weights grow tenfold."""
FIELD_EPS = 1e-2
"""At first the attention averages are near 0.02; a small eps would blow their gradients up fiftyfold."""


class OdeAttention(SoftmaxAttention):
    """Returns z(1) - z(0) for dz/dt = tau * RMS(W_o Attention(Norm(z) * (1 + s_stage))), z(0) = x.

    The outer RMS bounds the field by tau sqrt(D) whatever the weights do, so composing it over stages, steps and loops
    can't explode. s_stage is a cheap dependence on t; tau has one row per loop. With `checkpoint_steps` the
    activations of one solver step live at a time.
    """

    no_weight_decay = frozenset({"tau", "stage_scale"})

    def __init__(self, config: UltraConfig, window: int = 0) -> None:
        super().__init__(config, window, sub_norm=False)  # the field's own RMS takes SubLN's place
        self.solver, self.steps, self.loops = config.ode_solver, config.ode_steps, config.num_loops
        self.checkpoint_steps = False
        self.tau = nn.Parameter(torch.full((config.num_loops, config.hidden_size), FIELD_SCALE))  # [L, D]
        self.stage_scale = nn.Parameter(torch.zeros(STAGES[config.ode_solver], config.hidden_size))  # [S, D]

    def forward(self, x: Tensor, info: SegmentInfo, norm: Callable[[Tensor], Tensor], loop: int = 0) -> Tensor:
        """x [B, T, D], the residual stream -> its update [B, T, D]."""
        tau = self.tau[min(loop, self.loops - 1)]  # [D]

        def field(z: Tensor, stage: int) -> Tensor:
            return tau * rms(self.mix(norm(z) * (1 + self.stage_scale[stage]), info), FIELD_EPS)

        keep_one_step = self.checkpoint_steps and torch.is_grad_enabled()
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if keep_one_step else None
        return integrate(field, x, solver=self.solver, steps=self.steps, checkpoint=recompute)
