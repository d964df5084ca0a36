"""The quantisers and the GEMM of csrc/ternary_cpu.cpp as Python functions on CPU tensors in FP32.

Shapes: `M` rows (tokens), `N` output features, `D` input features, `K` inner dimension, `S` slices.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tbf.ops.ternary_build import load_library
from tbf.ops.ternary_reference import ACTIVATION_EPS, GRADIENT_EPS, WEIGHT_EPS, Quantised, ReferenceTools

PANEL = 16  # rows of the GEMM's right operand that lie together
PANELS_SPARE = 15 * 64  # bytes behind the right operand that an AMX tile may read, and whose products don't count
TERNARY_ZERO_POINT, INT8_ZERO_POINT = 1, 128  # what makes the right operand unsigned

_P, _L, _I, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
_SIGNATURES = {
    "tbf_has_gemm": [],
    "tbf_has_amx": [],
    "tbf_has_threads": [],
    "tbf_quantise_rows": [_P, _L, _L, _L, _F, _P, _D, _P, _L, _P, _P, _P, _I],
    "tbf_rms_norm_backward": [_P, _P, _L, _L, _L, _P, _P, _P, _P, _I],
    "tbf_ternarise": [_P, _L, _L, _D, _P, _P, _I],
    "tbf_pack_rows": [_P, _L, _L, _L, _I, _P, _I],
    "tbf_pack_columns": [_P, _L, _L, _L, _I, _P, _I],
    "tbf_quantise_gradient": [*[_P] * 4, _I, _L, _P, _F, _I, _P, _P, _L, *[_P] * 5, _I, *[_P] * 3, _I],
    "tbf_scale_products": [_P, _P, _L, _L, _P, _P, _P, _L, _I],
    "tbf_gemm": [_P, _P, _I, _L, _L, _P, _L, _L, _I, *[_P] * 5, _L, _I, _I],
}


@functools.lru_cache(maxsize=1)
def native_tools() -> NativeTools | None:
    """The compiled quantisers, or None where no compiler is."""
    library = load_library()
    return NativeTools(library) if library is not None else None


class NativeTools(ReferenceTools):
    """Same results as ReferenceTools, bit for bit, several times faster; CPU tensors in FP32 only."""

    name = "c++"

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _I if name.startswith("tbf_has_") or name == "tbf_gemm" else None
        self._library = library
        self.has_gemm = bool(library.tbf_has_gemm())
        self.has_amx = bool(library.tbf_has_amx())

    def quantise_rows(
        self, x: Tensor, gain: Tensor | None = None, norm_eps: float = 0.0
    ) -> tuple[Quantised, Tensor | None]:
        rows, cols = x.shape
        high = torch.empty(rows, round_up(cols, 4), dtype=torch.int8)  # the GEMM reads groups of 4
        scale, total = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        rrms = torch.empty(rows) if gain is not None else None
        self._call(
            "tbf_quantise_rows", x, rows, cols, x.stride(0), ACTIVATION_EPS, gain, norm_eps, high, high.stride(0),
            scale, total, rrms,
        )  # fmt: skip
        return Quantised(high, scale, total=total), rrms

    def norm_backward(self, dy: Tensor, x: Tensor, gain: Tensor, rrms: Tensor) -> tuple[Tensor, Tensor]:
        dx, dgain = torch.empty_like(dy), torch.empty_like(gain)
        self._call("tbf_rms_norm_backward", dy, x, *x.shape, x.stride(0), gain, rrms, dx, dgain)
        return dx, dgain

    def ternarise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.contiguous()
        values, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(())
        self._call("tbf_ternarise", weight, *weight.shape, WEIGHT_EPS, values, scale)
        return values, scale

    def quantise_gradient(
        self,
        dys: Sequence[Tensor],
        scales: Tensor,
        row_factor: Tensor | None,
        *,
        low: bool,
        rows: bool,
        columns: bool,
        tiled: bool = False,
    ) -> tuple[Quantised | None, Quantised | None]:
        """As in ReferenceTools; `tiled` gives the columns as the GEMM's left operand, parts and sums included."""
        m, widths = len(dys[0]), [dy.shape[1] for dy in dys]
        n = sum(widths)
        by_row = _empty_quantised((m, round_up(n, 4)), m, low) if rows else None
        by_column = None
        if columns and tiled:
            by_column = _empty_quantised((tiles_bytes(m, n, low),), n, low, whole=True)
        elif columns:
            by_column = _empty_quantised((m, n), n, low)
        self._call(
            "tbf_quantise_gradient", dys, widths, [dy.stride(0) for dy in dys], scales, len(dys), m, row_factor,
            GRADIENT_EPS, low,
            *_parts(by_row, "high", "low"), round_up(n, 4), *_parts(by_row, "scale", "total", "low_total"),
            *_parts(by_column, "high", "low"), tiled, *_parts(by_column, "scale", "total", "low_total"),
        )  # fmt: skip
        if by_row is not None and by_row.high.shape[1] != n and not tiled:  # only the GEMM wants the padding
            by_row.high, by_row.low = by_row.high[:, :n], by_row.low[:, :n] if low else None
        return by_row, by_column

    def scale_products(self, high: Tensor, low: Tensor | None, row_scale: Tensor, scale: Tensor) -> Tensor:
        if high.dtype != torch.int32:
            return super().scale_products(high, low, row_scale, scale)
        out = torch.empty(high.shape)
        self._call("tbf_scale_products", high, low, *high.shape, row_scale, scale, out, out.stride(0))
        return out

    def pack_rows(self, values: Tensor, zero_point: int) -> Tensor:
        """Packs int8 values [R, K] as the GEMM's right operand, R its output columns."""
        rows, inner = values.shape
        panels = _empty_panels(rows, inner)
        self._call("tbf_pack_rows", values, rows, inner, values.stride(0), zero_point, panels)
        return panels

    def pack_columns(self, values: Tensor, rows: int, zero_point: int) -> Tensor:
        """Packs the first `rows` columns of int8 values [K, >= rows] as the GEMM's right operand."""
        inner = len(values)
        panels = _empty_panels(rows, inner)
        self._call("tbf_pack_columns", values, inner, rows, values.stride(0), zero_point, panels)
        return panels

    def gemm(
        self,
        left: Quantised,
        rows: int,
        right: Tensor,
        cols: int,
        inner: int,
        *,
        zero_point: int,
        scale: Tensor,
        tiled: bool = False,
        amx: bool = False,
    ) -> Tensor:
        """left [rows, inner] times the packed right operand [cols, inner], transposed, scaled: FP32 [rows, cols]."""
        out = torch.empty(rows, cols)
        low = left.high if tiled and left.low_total is not None else left.low
        self._call(
            "tbf_gemm", left.high, low, tiled, rows, 0 if tiled else left.high.stride(0), right, cols, inner,
            zero_point, left.total, left.low_total, left.scale, scale, out, cols, amx,
        )  # fmt: skip
        return out

    def _call(self, name: str, *arguments: object) -> None:
        """Calls a function of the library with tensors as pointers, lists as arrays, and the number of threads last."""
        getattr(self._library, name)(*map(_c_value, arguments), torch.get_num_threads())


def round_up(n: int, multiple: int) -> int:
    """The next multiple of `multiple`, `n` itself included."""
    return -(-n // multiple) * multiple


def panels_bytes(rows: int, inner: int) -> int:
    """Bytes of a right operand [rows, inner]."""
    return round_up(rows, PANEL) * round_up(inner, 4) + PANELS_SPARE


def tiles_bytes(inner: int, rows: int, low: bool) -> int:
    """Bytes of a tiled left operand [rows, inner], both parts included."""
    return -(-rows // (4 if low else 8)) * round_up(inner, 4) * 8


def _empty_panels(rows: int, inner: int) -> Tensor:
    panels = torch.empty(panels_bytes(rows, inner), dtype=torch.uint8)
    panels[-PANELS_SPARE:] = 0  # equal weights have equal operands, down to the last byte
    return panels


def _empty_quantised(shape: tuple[int, ...], scales: int, low: bool, whole: bool = False) -> Quantised:
    """Room for a gradient; `whole`: `high` holds the low part too."""
    return Quantised(
        torch.empty(shape, dtype=torch.int8),
        torch.empty(scales),
        torch.empty(shape, dtype=torch.int8) if low and not whole else None,
        torch.empty(scales, dtype=torch.int32),
        torch.empty(scales, dtype=torch.int32) if low else None,
    )


def _parts(q: Quantised | None, *names: str) -> list[Tensor | None]:
    return [None if q is None else getattr(q, name) for name in names]


def _c_value(argument: object) -> object:
    if isinstance(argument, Tensor):
        address = argument.data_ptr() if argument.device.type == "cpu" else 0
        if not address and argument.numel():
            raise ValueError(f"the C++ kernels read CPU memory; got a tensor without it: {argument!r}")
        return address
    if isinstance(argument, Sequence):
        values = [_c_value(value) for value in argument]
        return ((_P if isinstance(argument[0], Tensor) else _L) * len(values))(*values)
    return argument
