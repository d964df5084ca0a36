"""How fast this processor is at what training does, by short measurements that are kept on disk.

A CPU has no honest datasheet for this: caches, memory channels and vector units of the one at hand decide.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F

from tbf.ops.ternary_backends import get_backend, prepare_weight
from tbf.ops.ternary_build import cache_folder, source_hash
from tbf.ops.ternary_probe import default_plan
from tbf.system import processor

_VERSION = 4
_SMALL, _LARGE = 1 << 16, 1 << 24  # elements: in the cache, and far beyond it


@dataclass(frozen=True)
class CpuRates:
    """Per second, with `threads` threads: operations of products, bytes read and written, elements of functions."""

    threads: int
    gemm: float
    """FP32, a matrix of a thousand rows."""
    batched_gemm: float
    """FP32, many matrices of 64 rows, as in scans and attention."""
    attention: float
    """FP32, torch's fused attention."""
    int8: float
    """The ternary backend that serves, without quantising."""
    quantise: float
    """Bytes."""
    near: float
    """Bytes of an operator whose tensors fit in the cache."""
    far: float
    """Bytes of one whose tensors don't."""
    strided: float
    """Bytes of a copy that turns rows into columns."""
    functions: float
    """Elements of exp, erf and the like, beyond moving them."""
    adam: float
    """Bytes of a fused Adam step (28 per parameter)."""
    operator_s: float
    """Seconds that an operator takes apart from its work."""


def cpu_rates(threads: int, *, refresh: bool = False) -> CpuRates:
    """The rates of this processor with so many threads: from disk, or measured in about two seconds."""
    parts = [processor(), torch.__version__, threads, source_hash(), _VERSION]
    path = cache_folder() / f"cpu-rates-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.json"
    if not refresh:
        try:
            return CpuRates(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass  # absent or damaged: measured again
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rates = _measure(threads)
    finally:
        torch.set_num_threads(before)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(asdict(rates)), encoding="utf-8")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk costs the next process a measurement, nothing else
    return rates


def shared(rates: CpuRates, processes: int) -> CpuRates:
    """What each of several processes gets when all of them work at once on what was measured for one."""
    values = {field.name: getattr(rates, field.name) for field in fields(rates)}
    kept = {"threads", "operator_s"}
    return CpuRates(**{name: value if name in kept else value / processes for name, value in values.items()})


@torch.inference_mode()
def _measure(threads: int) -> CpuRates:
    a, b = torch.randn(1024, 512), torch.randn(512, 1024)
    small = torch.randn(512, 64, 64)
    heads = torch.randn(8, 8, 256, 64)
    near, far = torch.randn(_SMALL), torch.randn(_LARGE)
    near_out, far_out = torch.empty_like(near), torch.empty_like(far)
    rows = torch.randn(2048, 2048)
    one = torch.ones(8)
    rates = {
        "gemm": 2 * 1024 * 1024 * 512 / _seconds(lambda: a @ b),
        "batched_gemm": 2 * 512 * 64**3 / _seconds(lambda: small @ small),
        "attention": 4 * 8 * 8 * 256 * 256 * 64 / _seconds(lambda: F.scaled_dot_product_attention(heads, heads, heads)),
        "near": 12 * _SMALL / _seconds(lambda: torch.add(near, near, out=near_out)),
        "far": 12 * _LARGE / _seconds(lambda: torch.add(far, far, out=far_out)),
        "strided": 8 * rows.numel() / _seconds(lambda: rows.T.contiguous()),
        "operator_s": _seconds(lambda: one + one),
    }
    moving = 8 * _SMALL / rates["near"]
    rates["functions"] = _SMALL / max(_seconds(lambda: torch.exp(near, out=near_out)) - moving, 1e-9)
    rates["adam"] = rates["far"]  # it streams through memory once
    return CpuRates(threads=threads, **rates, **_ternary_rates())


def _ternary_rates() -> dict[str, float]:
    """Rates of the ternary kernels at one shape, by whichever backend the probe takes."""
    m, d, n = 1024, 512, 512
    x, weight = torch.randn(m, d), torch.randn(n, d)
    plan = default_plan(torch.device("cpu"))
    backend = get_backend(plan.forward, "cpu")
    prepared = prepare_weight(weight, [n], plan)
    q, _ = backend.tools.quantise_rows(x)
    product = _seconds(lambda: backend.forward(q, prepared.forward[0], prepared.scales[0], n, d))
    quantise = _seconds(lambda: backend.tools.quantise_rows(x))
    return {"int8": 2 * m * d * n / product, "quantise": 5 * m * d / quantise}


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
