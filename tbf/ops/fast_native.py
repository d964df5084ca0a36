"""The fused encoder of csrc/fast_encoder.cpp: its library, and the structures that describe a model to it.

The structures mirror csrc/fast_model.h field by field; a description keeps the tensors that it points to alive.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbf.errors import HardwareError
from tbf.ops.ternary_build import BuildError, build, cache_folder
from tbf.ops.ternary_native import PANEL

SOURCES = (
    *("fast_encoder.cpp", "fast_gemm.h", "fast_memory.h", "fast_mixers.h", "fast_math.h", "fast_model.h"),
    *("ternary_amx.h", "ternary_gemm.h"),
)
MIXERS = {"retnet": 0, "titan_attn": 1, "mamba": 2, "ode": 3, "standard_attn": 4, "sigmoid_attn": 5}
NORMS = {"rms": 0, "layer_norm": 1, "derf": 2, "dynamic_tanh": 3}
ACTIVATIONS = {"relu2": 0, "silu": 1, "gelu": 2, "swiglu": 1, "geglu": 2}

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Description(ctypes.Structure):
    """Base of the structures: takes fields by name, tensors for pointers, and holds on to what it points to."""

    def __init__(self, **values: Any) -> None:
        self.kept: list[Any] = list(values.values())
        super().__init__(**{name: self._field(value) for name, value in values.items()})

    def _field(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            held = value.detach().contiguous()
            self.kept.append(held)
            return held.data_ptr()
        return ctypes.addressof(value) if isinstance(value, ctypes.Array) else value


class Linear(Description):
    """Ternary weights, one operand of `pack_quads` per slice."""

    _fields_ = [
        ("inner", _L), ("outer", _L), ("slices", _L), ("widths", _P), ("quads", _P), ("scales", _P), ("gain", _P),
        ("eps", _F),
    ]  # fmt: skip


class Norm(Description):
    _fields_ = [("kind", _L), ("weight", _P), ("bias", _P), ("alpha", _P), ("shift", _P), ("eps", _F)]


class Layer(Description):
    _fields_ = [
        ("mixer", _L), ("window", _L), ("mixer_norm", Norm), ("ffn_norm", Norm),
        ("in", Linear), ("out", Linear), ("up", Linear), ("down", Linear),
        *((name, _P) for name in ("q_gain", "k_gain", "tau", "stage_scale")),
        *((name, _P) for name in ("taps", "tap_bias", "rate", "step_bias", "skip", "gates", "gate_bias", "initial")),
    ]  # fmt: skip


class Model(Description):
    _fields_ = [
        *((name, _L) for name in ("hidden", "loops", "layers", "gated", "activation")),
        *((name, _L) for name in ("heads", "head_dim", "retention_heads", "retention_dim")),
        *((name, _L) for name in ("inner", "state", "mamba_heads", "mamba_dim", "taps")),
        *((name, _L) for name in ("stages", "steps", "hope", "memory_chunk")),
        ("eps", _F), ("layer", _P),
        *((name, _P) for name in ("inject", "shift", "final_gain", "log_gamma", "theta", "theta_prime")),
        *((name, _P) for name in ("rope", "retention_rope")), ("positions", _L),
    ]  # fmt: skip


@functools.cache
def fast_library() -> tuple[ctypes.CDLL, bool]:
    """The compiled encoder, and whether it multiplies in AMX tiles.

    Raises HardwareError where it can't be built or the processor lacks AVX512-VNNI.
    """
    try:
        library = ctypes.CDLL(str(build(cache_folder(), SOURCES)))
    except (BuildError, OSError) as error:
        raise HardwareError(f"the fast encoder: {error}; install g++, set CXX, or go without it") from None
    library.tbf_fast_encode.restype = None
    library.tbf_fast_encode.argtypes = [_P, _L, _P, _P, _L, _L, _I, _P, _I]
    if not library.tbf_fast_serves(0):
        raise HardwareError("the fast encoder needs a processor with AVX512-VNNI, which this one lacks; go without it")
    return library, bool(library.tbf_fast_serves(1))


def pack_quads(values: Tensor) -> Tensor:
    """Ternary values int8 [N, K] -> uint8 [panels, ceil(K / 16), 64], two bits each: the layout of csrc/fast_gemm.h."""
    rows, inner = values.shape
    padded = F.pad(values + 1, (0, -inner % 16, 0, -rows % PANEL)).to(torch.uint8)
    quads = padded.view(-1, PANEL, padded.shape[1] // 16, 4, 4).permute(3, 0, 2, 1, 4)  # [row of four, P, Q, 16, 4]
    first, second, third, fourth = quads.flatten(3).unbind()
    return first | second << 2 | third << 4 | fourth << 6


def fast_encode(model: Model, loops: int, x0: Tensor, edges: Tensor, group_rows: int) -> Tensor:
    """x0 [rows, D], documents between `edges` [documents + 1] -> last hidden states [rows, D]."""
    library, amx = fast_library()
    x0, edges, out = x0.float().contiguous(), edges.contiguous(), torch.empty(x0.shape)
    library.tbf_fast_encode(
        ctypes.byref(model), loops, x0.data_ptr(), edges.data_ptr(), len(edges) - 1, group_rows, amx, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
