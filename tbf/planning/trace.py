"""Follows the memory and the work of PyTorch code, operator by operator.

Under fake tensors it costs no memory and almost no arithmetic; on real ones it measures. torch's own MemTracker does
the same for memory (and a test holds this one to it), but knows neither gradients that wait nor operations.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tbf.planning.stand_ins import tensor_bytes

_SILENT = {"detach", "alias", "empty", "empty_strided", "empty_like", "new_empty", "device", "lift_fresh",
           "_unsafe_view"}  # fmt: skip
"""Operators without work of their own; views are recognised by their schema."""


_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
"""Products of the size of queries times keys in each."""


@dataclass(frozen=True)
class Operation:
    """One kernel: what it reads and writes, and its arithmetic."""

    name: str
    bytes: int
    flops: int = 0
    integer_ops: int = 0
    elements: int = 0
    """Numbers written."""


Work = Counter[Operation]
"""How often each kernel runs."""


class Trace(TorchDispatchMode):
    """Bytes of all tensors that were allocated inside and still live: `now`, its maximum `peak`, and `work` done.

    After `watch_gradients` two further maxima are kept, for a looped model, whose autograd holds each weight's gradient
    back until every visit has added to it: `peak_waiting`, as if all gradients so far were held (`waiting` bytes), and
    `peak_adding`, as if each were added to one that already waits, which takes a third copy for a moment.
    `peak_handing` is the most beside a gradient that is complete and goes to the engine.
    """

    def __init__(self, *, record_work: bool = True) -> None:
        super().__init__()
        self.now = self.peak = self.waiting = self.peak_waiting = self.peak_adding = self.peak_handing = 0
        self.work: Work = Counter()
        self._record_work = record_work
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(func, torch._ops.OpOverload):  # e.g. the device of a fake tensor
            return out
        outputs = out if isinstance(out, tuple | list) else (out,)
        for tensor, description in zip(outputs, func._schema.returns):
            if isinstance(tensor, Tensor) and description.alias_info is None:  # else it is, or is a view of, an input
                self._add(tensor)
        if self._record_work and not func.is_view and func._opname not in _SILENT:
            self.work[_describe(func, args, kwargs or {}, out)] += 1
        return out

    def report(self, name: str, moved: int, integer_ops: int) -> None:
        """Takes the report of a kernel that torch doesn't know."""
        if self._record_work:
            self.work[Operation(name, moved, integer_ops=integer_ops)] += 1

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts each gradient when it is complete and frees it, as the engine does."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._release)

    def reset_peaks(self) -> None:
        self.peak = self.peak_waiting = self.peak_adding = self.peak_handing = self.now
        self.waiting = 0

    def take_work(self) -> Work:
        """The work since the last call."""
        work, self.work = self.work, Counter()
        return work

    def _release(self, parameter: nn.Parameter) -> None:
        size = parameter.grad.numel() * parameter.element_size()
        self.peak_adding = max(self.peak_adding, self.now + size)
        parameter.grad = None
        self.peak_handing = max(self.peak_handing, self.now)
        self.waiting += size
        self.peak_waiting = max(self.peak_waiting, self.now + self.waiting)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.is_meta:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_waiting = max(self.peak_waiting, self.now + self.waiting)
        self.peak_adding = max(self.peak_adding, self.now)


def _describe(func: Any, args: tuple, kwargs: dict, out: Any) -> Operation:
    flops = integer_ops = 0
    if func._opname in _ATTENTION:
        flops = _ATTENTION[func._opname] * _attention_flops(args)
    elif func._opname == "_int_mm":
        integer_ops = 2 * args[0].numel() * args[1].shape[1]
    elif func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
    written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    read = args[1:] if func._opname == "copy_" else args
    return Operation(
        func._opname,
        tensor_bytes((read, kwargs)) + tensor_bytes(written),
        flops,
        integer_ops,
        elements=sum(tensor.numel() for tensor in written),
    )


def _attention_flops(args: tuple) -> int:
    """Of one product of queries and keys. The CPU's fused attention is missing from torch's own registry."""
    query, key = [leaf for leaf in args if isinstance(leaf, Tensor) and leaf.ndim == 4][:2]
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * width
