"""How fast this processor is at what training does, by short measurements that are kept on disk.

A CPU has no honest datasheet for this: caches, memory channels and vector units of the one at hand decide.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F

from tbf.ops.ternary_backends import get_backend, prepare_weight
from tbf.ops.ternary_build import cache_folder, source_hash
from tbf.ops.ternary_probe import default_plan
from tbf.system import busy, processor

_VERSION = 7
_ELEMENTS = 1 << 18  # of a tensor that is moved
_POOL = 160  # of them: an activation is met again after so many others that no cache holds it


@dataclass(frozen=True)
class CpuRates:
    """Per second, with `threads` threads: operations of products, bytes read and written, elements of functions."""

    threads: int
    gemm: float
    """FP32, a matrix of a thousand rows."""
    batched_gemm: float
    """FP32, many matrices of 64 rows, as in scans and attention."""
    attention: float
    """FP32, torch's fused attention, softmax and all."""
    int8: float
    """The ternary backend that serves, without quantising."""
    quantise: float
    """Bytes that the quantiser of activations reads and writes."""
    quantise_gradient: float
    """Bytes, of the quantiser of gradients, which lays them out by row and by column."""
    ternarise: float
    """FP32 bytes of weights, made ternary and laid out for both passes."""
    moving: float
    """Bytes that an operator reads and writes, in tensors that others have driven out of the near caches."""
    strided: float
    """Bytes of a copy that turns heads and tokens."""
    functions: float
    """Elements of exp, erf and the like, beyond moving them."""
    adam: float
    """Bytes of a fused Adam step (28 per parameter)."""
    operator_s: float
    """Seconds that an operator takes apart from its work, autograd's included."""


def cpu_rates(threads: int, *, refresh: bool = False) -> CpuRates:
    """The rates of this processor with so many threads: from disk, or measured in about two seconds."""
    names = {field.name for field in fields(CpuRates)}
    return CpuRates(**kept_on_disk("cpu-rates", names, threads, lambda: asdict(_measure(threads)), refresh=refresh))


def kept_on_disk(
    title: str, names: Set[str], threads: int, measure: Callable[[], dict[str, float]], *, refresh: bool
) -> dict[str, float]:
    """What `measure` found under these names with so many threads of this processor, now or earlier; kept unless other
    programs are in its way."""
    parts = [processor(), torch.__version__, threads, source_hash(), _VERSION]
    path = cache_folder() / f"{title}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"
    if not refresh:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.keys() == names:
                return found
        except (OSError, ValueError, AttributeError):
            pass  # absent or damaged: measured again
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = measure()
    finally:
        torch.set_num_threads(before)
    if busy():
        return found  # good enough for now, but not to be kept
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk costs the next process a measurement, nothing else
    return found


def shared(rates: CpuRates, processes: int) -> CpuRates:
    """What each of several processes gets when all of them work at once on what was measured for one."""
    values = {field.name: getattr(rates, field.name) for field in fields(rates)}
    kept = {"threads", "operator_s"}
    return CpuRates(**{name: value if name in kept else value / processes for name, value in values.items()})


@torch.inference_mode()
def _measure(threads: int) -> CpuRates:
    pool = _Pool(lambda: torch.randn(_ELEMENTS))
    heads = _Pool(lambda: torch.randn(2, 8, 256, 64), 64)
    small = _Pool(lambda: torch.randn(64, 64, 64))
    rows = _Pool(lambda: torch.randn(1, 8, 512, 128), 32)
    a, b = _Pool(lambda: torch.randn(512, 512)), _Pool(lambda: torch.randn(512, 2048), 8)
    stream, streamed = torch.randn(1 << 24), torch.empty(1 << 24)
    rates = {
        "gemm": 2 * 512 * 512 * 2048 / _seconds(lambda: a.next() @ b.next()),
        "batched_gemm": 2 * 64**4 / _seconds(lambda: small.next() @ small.next()),
        "attention": 4 * rows.next().numel() * 512 / _seconds(lambda: F.scaled_dot_product_attention(*rows.take(3))),
        "moving": 12 * _ELEMENTS / _seconds(lambda: pool.put(pool.next() + pool.next())),
        "strided": 8 * _ELEMENTS / _seconds(lambda: heads.next().transpose(1, 2).contiguous()),
        "adam": 12 * len(stream) / _seconds(lambda: torch.add(stream, stream, out=streamed)),  # it streams, too
        "operator_s": _operator_seconds(),
    }
    functions = _seconds(lambda: pool.put(torch.exp(pool.next()))) - 8 * _ELEMENTS / rates["moving"]
    rates["functions"] = _ELEMENTS / max(functions, 1e-9)
    return CpuRates(threads=threads, **rates, **_ternary_rates())


class _Pool:
    """Tensors that take turns, so that none is still in a near cache when it comes again."""

    def __init__(self, make: Callable[[], torch.Tensor], count: int = _POOL) -> None:
        self._tensors, self._at = [make() for _ in range(count)], 0

    def next(self) -> torch.Tensor:
        self._at = (self._at + 1) % len(self._tensors)
        return self._tensors[self._at]

    def take(self, count: int) -> list[torch.Tensor]:
        return [self.next() for _ in range(count)]

    def put(self, tensor: torch.Tensor) -> None:
        """Takes the place of the one that came last: what is new in training does not fall on warm memory either."""
        self._tensors[self._at] = tensor


@torch.inference_mode(False)
@torch.enable_grad()
def _operator_seconds(count: int = 50) -> float:
    """Of an operator that does nothing much, in a graph and its backward."""
    x = torch.ones(8, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(count):
            y = y * 1.0
        y.sum().backward()

    return _seconds(chain) / (2 * count)


def _ternary_rates() -> dict[str, float]:
    """Rates of the ternary kernels at one shape, by whichever backend the probe takes."""
    m, d, n = 1024, 512, 1024
    inputs = _Pool(lambda: torch.randn(m, d), 8)
    weights = _Pool(lambda: torch.randn(n, d), 8)
    plan = default_plan(torch.device("cpu"))
    backend = get_backend(plan.forward, "cpu")
    prepared = prepare_weight(weights.next(), [n], plan)
    quantised = [backend.tools.quantise_rows(inputs.next())[0] for _ in range(8)]
    rows = _Pool(quantised.pop, 8)
    product = _seconds(lambda: backend.forward(rows.next(), prepared.forward[0], prepared.scales[0], n, d))
    quantise = _seconds(lambda: backend.tools.quantise_rows(inputs.next()))
    scale = torch.ones(1)
    gradient = _seconds(
        lambda: backend.tools.quantise_gradient([inputs.next()], scale, None, low=False, rows=True, columns=True)
    )
    ternarise = _seconds(lambda: prepare_weight(weights.next(), [n], plan))
    return {
        "int8": 2 * m * d * n / product,
        "quantise": 5 * m * d / quantise,
        "quantise_gradient": 6 * m * d / gradient,
        "ternarise": 4 * n * d / ternarise,
    }


def _seconds(call: Callable[[], object], budget: float = 0.12) -> float:
    """Seconds of a call that nothing disturbs, warmed up: the first quartile of about `budget` seconds of calls, since
    other programs only ever slow one down."""
    call()
    times, started = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=4)[0]
