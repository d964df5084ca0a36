"""Forward and backward of one linear layer: BitLinear beside FP32, fake quantisation, bf16 and other libraries.

    python benchmarks/bitlinear.py [--quick] [--no-compile] [--rounds 15]

All variants of a shape are run alternately in one go, and medians are compared. torchao (`pip install torchao==0.18.0`)
and transformers take part when they are installed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tbf.train.environment import tune_allocator

ALLOCATOR = tune_allocator()  # as in training, before torch allocates: fresh pages cost more than the kernels

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tbf.model.bitlinear import BitLinear, invalidate_ternary  # noqa: E402
from tbf.ops.ternary_backends import TernaryPlan  # noqa: E402
from tbf.ops.ternary_probe import choose_plan  # noqa: E402
from tbf.ops.ternary_reference import ReferenceTools  # noqa: E402
from tbf.system import processor_name  # noqa: E402

SHAPES = ((2048, 384, 384), (2048, 384, 1536), (1024, 2048, 2048), (1024, 2048, 8192))  # tokens, in, out
Layer = Callable[[Tensor], Tensor]


class FakeQuantLinear(nn.Linear):
    """BitLinear as it is usually written: both operands rounded in FP32, an FP32 GEMM, gradients passed straight."""

    def forward(self, x: Tensor) -> Tensor:
        w_scale = 1.0 / self.weight.abs().mean().clamp_(min=1e-5)
        w_q = (self.weight * w_scale).round().clamp_(-1, 1) / w_scale
        x_scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-5)
        x_q = (x * x_scale).round().clamp_(-128, 127) / x_scale
        weight = self.weight + (w_q - self.weight).detach()
        return nn.functional.linear(x + (x_q - x).detach(), weight)


def both_ways(
    layer: Layer, weight: Tensor, x: Tensor, dy: Tensor, dtype: torch.dtype | None = None
) -> Callable[[], object]:
    """One forward and backward; with `dtype`, under autocast."""

    def call() -> tuple[Tensor, ...]:
        if dtype is None:
            return torch.autograd.grad(layer(x), (x, weight), dy)
        with torch.autocast("cpu", dtype):
            y = layer(x)
        return torch.autograd.grad(y, (x, weight), dy.to(y.dtype))

    return call


def our_variants(m: int, d: int, n: int, plan: TernaryPlan, x: Tensor, dy: Tensor, weight: Tensor) -> dict:
    """BitLinear in every gradient mode, and once with the weight quantised every time."""

    def variant(mode: str, fresh: bool = False) -> Callable[[], object]:
        layer = BitLinear(d, n)
        layer.load_state_dict({"weight": weight})
        layer.ternary_plan = TernaryPlan(plan.forward, plan.backward, mode)

        def forward(x: Tensor) -> Tensor:
            if fresh:
                invalidate_ternary()
            return layer(x)

        return both_ways(forward if fresh else layer, layer.weight, x, dy)

    return {
        "tbf int8_hilo": variant("int8_hilo"),
        "tbf int8": variant("int8"),
        "tbf int8_dx": variant("int8_dx"),
        "tbf fp32 gradients": variant("fp32"),
        "tbf int8_hilo, no cache": variant("int8_hilo", fresh=True),
    }


def peer_variants(d: int, n: int, x: Tensor, dy: Tensor, weight: Tensor, compiled: bool) -> dict:
    """Whatever else a user could take; what isn't installed is left out and said."""

    def load(linear: nn.Linear) -> nn.Linear:
        with torch.no_grad():
            linear.weight.copy_(weight)
        return linear

    found = {}
    for name, kind, dtype in (
        ("nn.Linear fp32", nn.Linear, None),
        ("fake quant eager", FakeQuantLinear, None),
        ("nn.Linear bf16 autocast", nn.Linear, torch.bfloat16),
    ):
        layer = load(kind(d, n, bias=False))
        found[name] = both_ways(layer, layer.weight, x, dy, dtype)
    try:
        from transformers.integrations.bitnet import AutoBitLinear
    except ImportError as error:
        print(f"transformers left out: {error}")
    else:
        for name, dtype in (("HF AutoBitLinear fp32", None), ("HF AutoBitLinear bf16", torch.bfloat16)):
            layer = load(AutoBitLinear(d, n, bias=False, online_quant=True))
            found[name] = both_ways(layer, layer.weight, x, dy, dtype)
    try:
        found |= torchao_variants(load, d, n, x, dy, compiled)
    except ImportError as error:
        print(f"torchao left out: {error}")
    return found


def torchao_variants(load: Callable, d: int, n: int, x: Tensor, dy: Tensor, compiled: bool) -> dict:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, bitnet_training
    from torchao.quantization import quantize_

    found = {}
    for name, config in (
        ("torchao bitnet_training", bitnet_training()),
        ("torchao int8 mixed", Int8MixedPrecisionTrainingConfig(module_swap=True)),
    ):
        model = nn.Sequential(load(nn.Linear(d, n, bias=False)))
        plain = model(x)
        quantize_(model, config)
        if torch.equal(model(x), plain):
            raise RuntimeError(f"{name} doesn't quantise")
        layer = torch.compile(model) if compiled else model
        found[f"{name}{' compiled' if compiled else ''}"] = both_ways(layer, model[0].weight, x, dy)
    return found


def bare_gemms(m: int, d: int, n: int) -> Callable[[], object]:
    """The three int8 GEMMs alone, by torch's routine: what no quantised layer on top of it can beat."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    x, w, dy, dy_t = integers(m, d), integers(n, d), integers(m, n), integers(n, m)
    return lambda: (torch._int_mm(x, w.T), torch._int_mm(dy, w), torch._int_mm(dy_t, x))


def gradient_error(plan: TernaryPlan, x: Tensor, dy: Tensor, weight: Tensor) -> float:
    """Largest relative error of dX and dW against FP64 gradients through the same quantised operands."""
    layer = BitLinear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight})
    layer.ternary_plan = TernaryPlan(plan.forward, plan.backward, "int8_hilo")
    got = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    tools = ReferenceTools()
    rows, _ = tools.quantise_rows(x.detach())
    w_values, w_scale = tools.ternarise(weight)
    exact = (
        dy.double() @ (w_values.double() * w_scale.double()),
        dy.double().T @ (rows.high.double() * rows.scale.double()[:, None]),
    )
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True))


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in every interleaved round, after two that only warm up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 2):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if round_ > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def run_shape(shape: tuple[int, int, int], rounds: int, compiled: bool, plan: TernaryPlan) -> tuple[dict, dict]:
    """Measures and prints one shape; returns its row and its figures."""
    m, d, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, d, generator=generator).requires_grad_()
    weight = torch.randn(n, d, generator=generator) * 0.02
    dy = torch.randn(m, n, generator=generator) * 1e-5
    variants = {
        **peer_variants(d, n, x, dy, weight, compiled),
        **our_variants(m, d, n, plan, x, dy, weight),
        "three bare int8 GEMMs": bare_gemms(m, d, n),
    }
    times = measure(variants, rounds)
    ms = {variant: median(values) for variant, values in times.items()}
    name = "x".join(map(str, shape))
    fp32, fake, bare = ms["nn.Linear fp32"], ms["fake quant eager"], ms["three bare int8 GEMMs"]
    print(f"\n{name}{'':16} ms   x nn.Linear fp32   x fake quant   % of bare GEMMs")
    for variant, value in ms.items():
        print(f"  {variant:28}{value:9.2f}{fp32 / value:12.2f}{fake / value:15.2f}{100 * bare / value:16.0f}")
    figures = {
        f"hilo_vs_fp32@{name}": fp32 / ms["tbf int8_hilo"],
        f"hilo_vs_fakequant@{name}": fake / ms["tbf int8_hilo"],
        f"int8_vs_fp32@{name}": fp32 / ms["tbf int8"],
        f"int8_vs_bf16@{name}": ms["nn.Linear bf16 autocast"] / ms["tbf int8"],
        f"int8_vs_bare_gemm@{name}": bare / ms["tbf int8"],
        f"hilo_grad_error@{name}": gradient_error(plan, x, dy, weight),
    }
    print(f"  relative error of int8_hilo gradients: {figures[f'hilo_grad_error@{name}']:.1e}")
    return {"shape": name, "ms": ms, "best_ms": {variant: min(values) for variant, values in times.items()}}, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smaller shapes, few rounds, nothing compiled")
    parser.add_argument("--no-compile", action="store_true", help="peers in eager mode")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    compiled = not (arguments.no_compile or arguments.quick)
    plan = choose_plan(torch.device("cpu"), [(d, n) for _, d, n in SHAPES[:3]], say=print)
    rows, figures = [], {}
    for shape in SHAPES[:2] if arguments.quick else SHAPES:
        row, found = run_shape(shape, rounds, compiled, plan)
        rows.append(row)
        figures |= found
    machine = {
        "processor": processor_name(),
        "allocator": ALLOCATOR,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plan": str(plan),
    }
    print()
    print(json.dumps({"benchmark": "bitlinear", "machine": machine, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
