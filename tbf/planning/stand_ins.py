"""Stand-ins for the ternary kernels that allocate what the real ones do, and compute nothing.

They are the real tools with the call into native code cut off, so what a trace sees of memory is what a run allocates,
and each cut-off call is reported as work: bytes moved, and integer operations of the GEMMs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tbf.ops.ternary_backends import BACKENDS, Backend, TernaryPlan
from tbf.ops.ternary_cuda import CudaTools
from tbf.ops.ternary_native import NativeTools
from tbf.ops.ternary_reference import ReferenceTools

Report = Callable[[str, int, int], None]
"""(name, bytes read and written, integer operations) of one kernel."""


@dataclass(frozen=True)
class StandInPlan(TernaryPlan):
    """A TernaryPlan whose backends only allocate."""

    tools: ReferenceTools = field(default_factory=ReferenceTools, compare=False)

    def backend(self, name: str, device_type: str) -> Backend:
        return BACKENDS[name](self.tools)


def stand_in_plan(plan: TernaryPlan, on_cuda: bool, report: Report, native: bool = True) -> StandInPlan:
    """The plan of a device, with tools that call `report` in place of native code. Without `native`: eager ones."""
    tools: ReferenceTools = ReferenceTools()
    if native:
        tools = CudaStandIn(report) if on_cuda else CpuStandIn(report)
    return StandInPlan(plan.forward, plan.backward, plan.mode, tools)


class CpuStandIn(NativeTools):
    """NativeTools without their library."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.has_gemm = True

    def _call(self, name: str, *arguments: object) -> None:
        operations = 0
        if name == "tbf_gemm":
            _, low, _, rows, _, _, cols, inner, *_ = arguments
            operations = 2 * rows * cols * inner * (1 if low is None else 2)
        self._report(name, tensor_bytes(arguments), operations)


class CudaStandIn(CudaTools):
    """CudaTools without a card."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def _launch(self, name: str, grid: tuple[int, int], *arguments: object, **_: object) -> None:
        operations = 0
        if name in ("gemm_one", "gemm_two"):
            rows, cols, inner = arguments[3:6]
            operations = 2 * rows * cols * inner * (1 if name == "gemm_one" else 2)
        self._report(name, tensor_bytes(arguments), operations)


def tensor_bytes(values: object) -> int:
    """Bytes of the tensors among `values`; of an expanded one, what lies in memory."""
    return sum(_bytes(value) for value in tree_leaves(values) if isinstance(value, Tensor))


def _bytes(tensor: Tensor) -> int:
    distinct = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0]
    return math.prod(distinct) * tensor.element_size()
