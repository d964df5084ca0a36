"""Who multiplies: the integer GEMMs of ternary compute on each kind of device, all giving the same forward bits.

Shapes: `M` rows (tokens), `N` output features (summed over `S` slices), `D` input features.

    forward   y  = (Xq Wq^T) * row scale * weight scale
    backward  dX = q(dY * weight scale) Wq          dW = q(dY * row scale)^T Xq

Operands are small integers, so an FP32 GEMM over them is exact while D * 128 < 2^24, and `fp32` is not another model
but the same one computed elsewhere. Xq and Wq enter the backward as they are; only dY is rounded, in one or two parts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbf.errors import ConfigError, HardwareError, nearest
from tbf.ops.ternary_cuda import CudaTools, cuda_tools, pad_rows
from tbf.ops.ternary_native import INT8_ZERO_POINT, TERNARY_ZERO_POINT, NativeTools, native_tools
from tbf.ops.ternary_reference import Quantised, ReferenceTools

GRADIENT_MODES = ("fp32", "int8_dx", "int8_hilo", "int8")
DEFAULT_MODE = "int8"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TernaryPlan:
    """Which backend multiplies forward and backward, and how gradients are rounded.

    Modes: `fp32` FP32 gradients; `int8_dx` one int8 part for dX, FP32 dW; `int8_hilo` two int8 parts for both; `int8`
    one part for both. The backward backend `fp32` always means FP32 gradients. Raises ConfigError on unknown names.
    """

    forward: str
    backward: str
    mode: str = DEFAULT_MODE

    def __post_init__(self) -> None:
        for name in (self.forward, self.backward):
            if name not in BACKENDS:
                raise ConfigError(f"TBF_KERNEL: unknown backend '{name}', {nearest(name, BACKENDS)}")
        if self.mode not in GRADIENT_MODES:
            raise ConfigError(f"ternary gradient mode: unknown '{self.mode}', {nearest(self.mode, GRADIENT_MODES)}")

    @property
    def weight_backend(self) -> str:
        """The backend whose layout of the weights dX needs."""
        return "fp32" if self.mode == "fp32" else self.backward

    def backend(self, name: str, device_type: str) -> Backend:
        """Who computes under that name. A subclass may put a stand-in here, e.g. one that only allocates."""
        return get_backend(name, device_type)

    def __str__(self) -> str:
        gradients = "FP32 gradients" if self.weight_backend == "fp32" else f"{self.mode} gradients by {self.backward}"
        return f"forward by {self.forward}, {gradients}"


@dataclass
class TernaryWeight:
    """One matrix [N, D] as the plan's backends want it: made once per optimizer step, never changed afterwards."""

    slices: tuple[int, ...]
    in_features: int
    forward: list[Tensor]  # one operand per slice
    backward: Tensor
    scales: Tensor  # [S]


class Backend:
    """FP32 products of the integer operands, on any device: the base of the others and their fallback."""

    name = "fp32"

    def __init__(self, tools: ReferenceTools) -> None:
        self.tools = tools

    def missing(self, device: torch.device) -> str | None:
        """Why this backend can't serve `device`, or None."""
        return None

    def forward_operand(self, values: Tensor) -> Tensor:
        """Lays out int8 weights [N_i, D] for `forward`."""
        return values

    def backward_operand(self, values: Tensor) -> Tensor:
        """Lays out int8 weights [N, D] for dX."""
        return values

    def forward(self, x: Quantised, operand: Tensor, scale: Tensor, out_features: int, in_features: int) -> Tensor:
        """y FP32 [M, N_i]."""
        products = x.high[:, :in_features].float() @ operand.float().T  # whole numbers [M, N_i]
        return products.mul_(x.scale[:, None]).mul_(scale)

    def backward(
        self, dys: Sequence[Tensor], x: Quantised, weight: TernaryWeight, *, low: bool, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dX [M, D], dW [N, D]) in FP32, None where not needed."""
        dx = dw = None
        if need_x:
            scaled = torch.cat([dy * scale for dy, scale in zip(dys, weight.scales.unbind())], -1)  # [M, N]
            dx = scaled @ weight.backward.float()
        if need_w:
            value = x.high[:, : weight.in_features].float().mul_(x.scale[:, None])  # [M, D]
            dw = torch.cat([dy.T @ value for dy in dys]) if len(dys) > 1 else dys[0].T @ value
        return dx, dw


class IntegerBackend(Backend):
    """int8 products by one routine [M, K] x [N, K] -> int32 [M, N], scaled afterwards."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T of int8 [M, K] and [N, K], in int32."""
        raise NotImplementedError

    def arrange(self, values: Tensor) -> Tensor:
        """Makes a transposed view what `product` can read."""
        return values

    def scaled_product(self, left: Quantised, right: Tensor, row_scale: Tensor, scale: Tensor) -> Tensor:
        """(high + low / 254) right^T * row_scale * scale, in FP32."""
        low = None if left.low is None else self.product(left.low, right)
        return self.tools.scale_products(self.product(left.high, right), low, row_scale, scale)

    def backward_operand(self, values: Tensor) -> Tensor:
        return self.arrange(values.T)

    def forward(self, x: Quantised, operand: Tensor, scale: Tensor, out_features: int, in_features: int) -> Tensor:
        return self.scaled_product(Quantised(x.high[:, :in_features], x.scale), operand, x.scale, scale)

    def backward(
        self, dys: Sequence[Tensor], x: Quantised, weight: TernaryWeight, *, low: bool, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        by_row, by_column = self.tools.quantise_gradient(
            dys, weight.scales, x.scale, low=low, rows=need_x, columns=need_w
        )
        one = torch.ones((), device=x.scale.device)
        dx = dw = None
        if by_row is not None:
            dx = self.scaled_product(by_row, weight.backward, by_row.scale, one)
        if by_column is not None:
            rest = None if by_column.low is None else self.arrange(by_column.low.T)
            left = Quantised(self.arrange(by_column.high.T), by_column.scale, rest)
            dw = self.scaled_product(left, self.arrange(x.high[:, : weight.in_features].T), left.scale, one)
        return dx, dw


class CpuInt8(IntegerBackend):
    """oneDNN's int8 GEMM behind torch: AMX where the processor has it. Reads transposed operands as they are."""

    name = "cpu_int8"
    block_bytes = 4 << 20  # int32 products that should still be in the cache when they are scaled

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "serves CPUs only"

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if 0 in (*a.shape, *b.shape):
            return torch.zeros(len(a), len(b), dtype=torch.int32)
        if 1 in (*a.shape, *b.shape):  # torch's routine trusts the meaningless strides of such a dimension
            a, b = F.pad(a, (0, 1)), F.pad(b, (0, 1))
        return torch._int_mm(a, b.T)

    def scaled_product(self, left: Quantised, right: Tensor, row_scale: Tensor, scale: Tensor) -> Tensor:
        rows = max(64, self.block_bytes // (4 * max(1, len(right))))
        if len(left.high) <= rows:
            return super().scaled_product(left, right, row_scale, scale)
        parts = []
        for high, factor, first in zip(
            left.high.split(rows), row_scale.split(rows), range(0, len(left.high), rows), strict=True
        ):
            low = None if left.low is None else left.low[first : first + rows]
            parts.append(super().scaled_product(Quantised(high, factor, low), right, factor, scale))
        return torch.cat(parts)


class CpuVnni(Backend):
    """Our own AVX512-VNNI GEMM: packed operands, scales and both gradient parts inside the GEMM, nothing in int32."""

    name = "cpu_vnni"
    amx = False
    tools: NativeTools

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "serves CPUs only"
        if not isinstance(self.tools, NativeTools):
            return "needs a C++ compiler"
        return None if self.tools.has_gemm else "needs AVX512-VNNI"

    def forward_operand(self, values: Tensor) -> Tensor:
        return self.tools.pack_rows(values, TERNARY_ZERO_POINT)

    def backward_operand(self, values: Tensor) -> Tensor:
        return self.tools.pack_columns(values, values.shape[1], TERNARY_ZERO_POINT)

    def forward(self, x: Quantised, operand: Tensor, scale: Tensor, out_features: int, in_features: int) -> Tensor:
        return self._gemm(
            x, len(x.high), operand, out_features, in_features, zero_point=TERNARY_ZERO_POINT, scale=scale
        )

    def backward(
        self, dys: Sequence[Tensor], x: Quantised, weight: TernaryWeight, *, low: bool, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        m, n, d = len(x.high), sum(weight.slices), weight.in_features
        by_row, by_column = self.tools.quantise_gradient(
            dys, weight.scales, x.scale, low=low, rows=need_x, columns=need_w, tiled=True
        )
        one = torch.ones(())
        dx = dw = None
        if by_row is not None:
            dx = self._gemm(by_row, m, weight.backward, d, n, zero_point=TERNARY_ZERO_POINT, scale=one)
        if by_column is not None:
            tokens = self.tools.pack_columns(x.high, d, INT8_ZERO_POINT)
            dw = self._gemm(by_column, n, tokens, d, m, zero_point=INT8_ZERO_POINT, scale=one, tiled=True)
        return dx, dw

    def _gemm(self, *arguments: Any, **options: Any) -> Tensor:
        return self.tools.gemm(*arguments, amx=self.amx, **options)


class CpuAmx(CpuVnni):
    """The same operands and the same results in AMX tiles."""

    name = "cpu_amx"
    amx = True

    def missing(self, device: torch.device) -> str | None:
        return super().missing(device) or (
            None if self.tools.has_amx else "needs AMX, and the system's leave to use it"
        )


class CudaIntMm(IntegerBackend):
    """cublasLt's int8 GEMM behind torch, in the one form it is sure to serve: both operands contiguous along K."""

    name = "cuda_int_mm"

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "serves CUDA devices only"

    def arrange(self, values: Tensor) -> Tensor:
        return values.contiguous()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        m, n, k = len(a), len(b), a.shape[1]
        if 0 in (m, n, k):
            return torch.zeros(m, n, dtype=torch.int32, device=a.device)
        pad_k, pad_n, pad_m = -k % 8, -n % 8, max(0, 32 - m)  # _int_mm wants K and N in eights and more than 16 rows
        a = F.pad(a, (0, pad_k, 0, pad_m))
        b = F.pad(b, (0, pad_k, 0, pad_n))
        return torch._int_mm(a, b.T)[:m, :n].contiguous()


class CudaDp4a(Backend):
    """Our own DP4A GEMM, for cards from Pascal (6.1) on: scales and both gradient parts inside the GEMM."""

    name = "cuda_dp4a"
    tools: CudaTools

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "serves CUDA devices only"
        return None if isinstance(self.tools, CudaTools) else "its kernels could not be built"

    def forward_operand(self, values: Tensor) -> Tensor:
        return pad_rows(values)

    def backward_operand(self, values: Tensor) -> Tensor:
        return pad_rows(values.T)

    def forward(self, x: Quantised, operand: Tensor, scale: Tensor, out_features: int, in_features: int) -> Tensor:
        return self.tools.gemm(x, operand, scale)

    def backward(
        self, dys: Sequence[Tensor], x: Quantised, weight: TernaryWeight, *, low: bool, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        by_row, by_column = self.tools.quantise_gradient(
            dys, weight.scales, x.scale, low=low, rows=need_x, columns=need_w, transposed=True
        )
        one = torch.ones((), device=x.scale.device)
        dx = dw = None
        if by_row is not None:
            dx = self.tools.gemm(by_row, weight.backward, one)
        if by_column is not None:
            dw = self.tools.gemm(by_column, self.tools.transpose(x.high, weight.in_features), one)
        return dx, dw


BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (Backend, CpuInt8, CpuVnni, CpuAmx, CudaIntMm, CudaDp4a)
}


@functools.cache
def get_backend(name: str, device_type: str) -> Backend:
    """The backend with the fastest quantisers for this kind of device. Raises HardwareError if it can't serve it."""
    backend = BACKENDS[name](fastest_tools(device_type))
    reason = backend.missing(torch.device(device_type))
    if reason is not None:
        raise HardwareError(
            f"ternary backend '{name}' can't serve {device_type}: {reason}; take another TBF_KERNEL or unset it"
        )
    return backend


@functools.cache
def fastest_tools(device_type: str) -> ReferenceTools:
    """Compiled quantisers where they exist, else eager ones: said once, with the reason."""
    if device_type == "cpu":
        return native_tools() or ReferenceTools()
    if device_type == "cuda":
        try:
            return cuda_tools(torch.cuda.current_device())
        except (HardwareError, RuntimeError, OSError) as error:
            log.warning("ternary kernels: %s; going on with slower eager torch on this card", error)
    return ReferenceTools()


def prepare_weight(weight: Tensor, slices: Sequence[int], plan: TernaryPlan) -> TernaryWeight:
    """Ternarises `weight` FP32 [N, D], one scale per slice of its rows, and lays it out for the plan's backends."""
    forward = plan.backend(plan.forward, weight.device.type)
    backward = plan.backend(plan.weight_backend, weight.device.type)
    parts = [forward.tools.ternarise(part) for part in weight.detach().split(list(slices))]
    values = torch.cat([part for part, _ in parts]) if len(parts) > 1 else parts[0][0]  # int8 [N, D]
    return TernaryWeight(
        slices=tuple(slices),
        in_features=weight.shape[1],
        forward=[forward.forward_operand(part) for part in values.split(list(slices))],
        backward=backward.backward_operand(values),
        scales=torch.stack([scale for _, scale in parts]),
    )
