"""The token mixers, by their names in a layer pattern.

Each is called as mixer(x [B, T, D], info, norm, loop) on the raw residual stream and returns its update [B, T, D].
"""

from __future__ import annotations

from torch import nn

from tbf.model.mixers.mamba import Mamba
from tbf.model.mixers.ode_attention import OdeAttention
from tbf.model.mixers.retention import Retention
from tbf.model.mixers.softmax_attention import SigmoidAttention, SoftmaxAttention
from tbf.model.mixers.titan_attention import TitanAttention

MIXERS: dict[str, type[nn.Module]] = {
    "retnet": Retention,
    "titan_attn": TitanAttention,
    "mamba": Mamba,
    "ode": OdeAttention,
    "standard_attn": SoftmaxAttention,
    "sigmoid_attn": SigmoidAttention,
}
