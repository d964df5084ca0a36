"""Splits a model's parameters into AdamW groups, each parameter exactly once."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two groups: matrices with decay; vectors, gates and decay parameters without.

    A module names its own exceptions in `no_weight_decay` (local parameter names): by type, never by substrings of
    names. The order is that of `named_parameters`, equal on every rank.
    """
    exempt = {
        id(module.get_parameter(name)) for module in model.modules() for name in getattr(module, "no_weight_decay", ())
    }
    decayed, undecayed = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (undecayed if parameter.ndim < 2 or id(parameter) in exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": undecayed, "weight_decay": 0.0, "name": "undecayed"},
    ]
