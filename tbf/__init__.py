"""tbf: pretrain hybrid ternary encoders on old GPUs with DeepSpeed.

    from tbf import UltraConfig, TormentedBertFrankenstein, TormentedBertMini, SpanishSPMTokenizer, load_pretrained

Names are imported when they are first used, so that `tbf --help` needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbf.data.tokenizer import SpanishSPMTokenizer
    from tbf.export.plain import load_pretrained
    from tbf.model.config import UltraConfig
    from tbf.model.encoder import TormentedBertFrankenstein, TormentedBertMini

__version__ = "0.1.0"
__all__ = ["SpanishSPMTokenizer", "TormentedBertFrankenstein", "TormentedBertMini", "UltraConfig", "load_pretrained"]

_HOMES = {
    "SpanishSPMTokenizer": "tbf.data.tokenizer",
    "TormentedBertFrankenstein": "tbf.model.encoder",
    "TormentedBertMini": "tbf.model.encoder",
    "UltraConfig": "tbf.model.config",
    "load_pretrained": "tbf.export.plain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tbf' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
