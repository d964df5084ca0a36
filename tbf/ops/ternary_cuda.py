"""Ternary compute on our own CUDA kernels (csrc/ternary_cuda.cu): DP4A, from sm_61 (P40, GTX 10) on.

Shapes: `M` rows (tokens), `N` output features, `D` input features, `K` inner dimension.

The kernels are reached through `Launcher`, which a test replaces by one that runs the same source on the host.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tbf.errors import HardwareError
from tbf.ops.ternary_nvrtc import CudaModule, cached_cubin
from tbf.ops.ternary_reference import ACTIVATION_EPS, GRADIENT_EPS, Quantised, ReferenceTools

ALIGN = 16  # bytes that a thread loads at once: every row of an int8 operand starts and ends at such a boundary
TILE = 128  # of the GEMM


class Launcher(Protocol):
    """Something that runs a named kernel."""

    def launch(self, name: str, grid: tuple[int, int], arguments: Sequence[object], stream: int) -> None: ...


class CudaTools(ReferenceTools):
    """The fused quantisers and the DP4A GEMM. Whatever has no kernel of its own runs in eager torch."""

    name = "cuda"

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def quantise_rows(
        self, x: Tensor, gain: Tensor | None = None, norm_eps: float = 0.0
    ) -> tuple[Quantised, Tensor | None]:
        rows, cols = x.shape
        high = x.new_empty(rows, round_up(cols), dtype=torch.int8)
        scale, rrms = x.new_empty(rows), x.new_empty(rows) if gain is not None else None
        self._launch(
            "quantise_rows", (rows, 1), x, x.stride(0), cols, ACTIVATION_EPS, gain, ctypes.c_double(norm_eps), high,
            high.shape[1], scale, rrms, long={1},
        )  # fmt: skip
        return Quantised(high, scale), rrms

    def quantise_gradient(
        self,
        dys: Sequence[Tensor],
        scales: Tensor,
        row_factor: Tensor | None,
        *,
        low: bool,
        rows: bool,
        columns: bool,
        transposed: bool = False,
    ) -> tuple[Quantised | None, Quantised | None]:
        """As in ReferenceTools; `transposed` gives the columns as rows [N, M], ready for the GEMM."""
        if columns and not transposed:
            return super().quantise_gradient(dys, scales, row_factor, low=low, rows=rows, columns=columns)
        dy = torch.cat(list(dys), -1) if len(dys) > 1 else dys[0]  # [M, N]
        m, n = dy.shape
        by_row = by_column = None
        if rows:
            factor = torch.cat([scale.expand(part.shape[1]) for scale, part in zip(scales.unbind(), dys)])  # [N]
            by_row = _room(dy, m, round_up(n), low)
            self._launch(
                "gradient_rows", (m, 1), dy, dy.stride(0), n, factor, GRADIENT_EPS, by_row.high, by_row.low,
                by_row.high.shape[1], by_row.scale, long={1},
            )  # fmt: skip
        if columns:
            factor = dy.new_ones(m) if row_factor is None else row_factor
            largest = torch.zeros(n, dtype=torch.int32, device=dy.device)
            self._launch(
                "column_largest", (-(-n // 32), -(-m // 256)), dy, dy.stride(0), m, n, factor, largest, long={1}
            )
            by_column = _room(dy, n, round_up(m), low)
            width = by_column.high.shape[1]
            self._launch(
                "gradient_columns", (-(-n // 32), max(1, -(-width // 64))), dy, dy.stride(0), m, n, factor, largest,
                GRADIENT_EPS, by_column.high, by_column.low, width, by_column.scale, long={1},
            )  # fmt: skip
        return by_row, by_column

    def transpose(self, q: Tensor, features: int) -> Tensor:
        """The first `features` columns of q int8 [M, >= D] as rows [D, M], padded for the GEMM."""
        out = q.new_empty(features, round_up(len(q)))
        grid = (-(-features // 32), -(-out.shape[1] // 64))
        self._launch("transpose_bytes", grid, q, q.stride(0), len(q), features, out, out.shape[1])
        return out

    def gemm(self, left: Quantised, right: Tensor, scale: Tensor) -> Tensor:
        """left [M, K] right [N, K]^T * left.scale * scale in FP32 [M, N]; both padded to the same K."""
        m, n = len(left.high), len(right)
        out = right.new_empty(m, n, dtype=torch.float32)
        name, rows = ("gemm_one", TILE) if left.low is None else ("gemm_two", TILE // 2)
        self._launch(
            name, (-(-n // TILE), -(-m // rows)), left.high, left.low, right, m, n, right.shape[1], left.scale, scale,
            out,
        )  # fmt: skip
        return out

    def _launch(
        self, name: str, grid: tuple[int, int], *arguments: object, long: frozenset[int] | set[int] = frozenset()
    ) -> None:
        """Turns tensors into pointers and numbers into the C types of the kernel: float, int, or 64 bits in `long`."""
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        values = [_c_value(argument, i in long) for i, argument in enumerate(arguments)]
        self._launcher.launch(name, grid, values, stream)


@functools.cache
def cuda_tools(device_index: int) -> CudaTools:
    """The kernels for one card. Raises HardwareError where they can't be built or the card has no DP4A."""
    major, minor = torch.cuda.get_device_capability(device_index)
    if not has_fast_dp4a((major, minor)):
        raise HardwareError(f"capability {major}.{minor} has no fast DP4A (6.1 and 7.0 on have)")
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # the driver calls below need torch's context to exist
        return CudaTools(CudaModule(cached_cubin(f"sm_{major}{minor}")))


def has_fast_dp4a(capability: tuple[int, int]) -> bool:
    """Whether cards of this compute capability multiply four int8 pairs in one instruction, at full speed."""
    return capability >= (6, 1) and capability != (6, 2)


def pad_rows(values: Tensor) -> Tensor:
    """int8 [R, K] with rows that the GEMM can read."""
    return F.pad(values, (0, round_up(values.shape[1]) - values.shape[1])).contiguous()


def round_up(n: int) -> int:
    """The row length in bytes of an int8 operand with n columns."""
    return -(-n // ALIGN) * ALIGN


def _room(like: Tensor, rows: int, width: int, low: bool) -> Quantised:
    parts = [like.new_empty(rows, width, dtype=torch.int8) for _ in range(2 if low else 1)]
    return Quantised(parts[0], like.new_empty(rows), parts[1] if low else None)


def _c_value(argument: object, long: bool) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_longlong(argument) if long else ctypes.c_int(argument)
    return argument
