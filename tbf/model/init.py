"""Initial weights, drawn from PyTorch's default generator: `torch.manual_seed` decides them."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from tbf.model.bitlinear import BitLinear
from tbf.model.config import UltraConfig
from tbf.model.embeddings import TokenTable

RESIDUAL_OUTPUTS = ("out_proj", "down_proj")
"""Names of the projections that write into the residual stream."""


def linear_std(config: UltraConfig, fan_in: int, name: str) -> float:
    """Standard deviation of a projection: min(initializer_std, 1/sqrt(3 fan_in)), smaller by 1/sqrt(2 visits) when it
    writes into the residual stream, which then grows by as much whatever the depth (2 writes per layer visit)."""
    std = min(config.initializer_std, 1 / math.sqrt(3 * fan_in))
    if name.rpartition(".")[2] in RESIDUAL_OUTPUTS:
        std /= math.sqrt(2 * config.num_layers * config.num_loops)
    return std


def truncated_normal(weight: nn.Parameter, std: float) -> None:
    """Normal, cut at two standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class NoDraws(TorchFunctionMode):
    """Skips random draws into meta tensors, which have no values: the first one would make torch import sympy and more,
    which costs 75 MB and a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "erfinv_"):
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def init_weights(model: nn.Module, config: UltraConfig) -> None:
    """Fills the projections and the table; every module with an `init_parameters` method then sets its own parameters.

    Norms, gains and SubLN keep the ones and zeros that they were built with. A model on the meta device is left alone.
    """
    if next(model.parameters()).is_meta:
        return
    for name, module in model.named_modules():
        if isinstance(module, (BitLinear, nn.Linear)):
            truncated_normal(module.weight, linear_std(config, module.weight.shape[1], name))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TokenTable):
            truncated_normal(module.weight, config.initializer_std)
    for module in model.modules():
        if hasattr(module, "init_parameters"):
            module.init_parameters()
