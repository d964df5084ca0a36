"""Embeddings a second on the CPU: packed ternary exports beside FP32, BERT in FP32 and bf16, and ONNX Runtime's int8.

    python benchmarks/inference.py [--quick] [--rounds 5] [--models mini slice] [--compiled]

`mini` visits its 6 layers twice; `slice` is two layers of frankenstein_2048, visited twice. Both are exported in the
packed format and loaded from it, as it is and `fast`. Beside them: the same model with plain FP32 projections (with
`--compiled` also through torch.compile, which takes a minute for each shape), Hugging Face's BERT of the
same width and as many layers as ours has visits (FFN four times as wide, as BERT's is), in FP32 and bf16, and that BERT
in ONNX Runtime, in FP32 and with dynamic int8 (needs `pip install 'tbf[bench]'`; left out where that is missing).
Weights are random: times do not depend on them. Batches of 32 rows of 128 tokens, and single sentences of 24; all take
turns in one run and medians are compared. `--cpu-time` counts the processor seconds of one thread, which other work on
the machine lengthens little. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tbf.train.environment import tune_allocator  # noqa: E402

ALLOCATOR = tune_allocator()

import torch  # noqa: E402
import transformers  # noqa: E402

import tbf.model.packed as packed_layers  # noqa: E402
from tbf.config import load_run_config  # noqa: E402
from tbf.export.plain import load_pretrained  # noqa: E402
from tbf.export.stored import StoredTensor  # noqa: E402
from tbf.export.ternary import packed_slices, packed_tensors  # noqa: E402
from tbf.export.weights import write_weights  # noqa: E402
from tbf.model.bitlinear import BitLinear  # noqa: E402
from tbf.model.config import UltraConfig  # noqa: E402
from tbf.model.encoder import TormentedBertFrankenstein  # noqa: E402
from tbf.model.outputs import EncoderOutput  # noqa: E402
from tbf.ops.ternary_probe import default_plan  # noqa: E402
from tbf.system import processor_name  # noqa: E402

MODELS = {
    "mini": ("mini", ["model.vocab_size=50000"]),
    "slice": (
        "frankenstein_2048",
        ["model.vocab_size=50000", "model.num_layers=2", "model.layer_pattern=[retnet, titan_attn]"],
    ),
}
"""Preset and changes."""
SHAPES = {"batch of 32 x 128": (32, 128), "single, 24 tokens": (1, 24)}
FAST, OURS, ONNX_INT8 = "tbf packed, fast", "tbf packed ternary", "BERT ONNX int8"
PLAIN, COMPILED = "tbf plain FP32", "tbf FP32, compiled"
ENOUGH = 0.3
"""Seconds that a measurement takes at least."""

Embed = Callable[[torch.Tensor], torch.Tensor]


def build(name: str, compiled: bool) -> dict[str, Embed]:
    """Everything that is compared for one model: name -> ids [B, T] to vectors [B, D]."""
    preset, changes = MODELS[name]
    config = load_run_config(preset, changes).model
    found = {FAST: packed(config, fast=True), OURS: packed(config), PLAIN: embedder(plain(config))}
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # a graph for each layer and loop, as the model isn't traced whole
        found[COMPILED] = embedder(torch.compile(plain(config), dynamic=False))
    visits = config.num_layers * config.num_loops
    model = bert(config, visits)
    found["BERT FP32"] = lambda ids: model(input_ids=ids).last_hidden_state.mean(1)
    half = bert(config, visits).to(torch.bfloat16)
    found["BERT bf16"] = lambda ids: half(input_ids=ids).last_hidden_state.mean(1)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found |= onnx_sessions(model)
    else:
        print("ONNX Runtime is left out: pip install 'tbf[bench]'", flush=True)
    return found


def embedder(model: Callable[..., EncoderOutput]) -> Embed:
    return lambda ids: model(ids, attention_mask=torch.ones_like(ids)).pooler_output


def packed(config: UltraConfig, *, fast: bool = False) -> Embed:
    """The model as `load_pretrained` gives it from a ternary export."""
    torch.manual_seed(0)
    made = TormentedBertFrankenstein(config)
    tensors = {name: StoredTensor(v.shape, v.dtype, v.clone) for name, v in made.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), packed_tensors(tensors, packed_slices(made)), "ternary")
        config.save(Path(folder) / "config.json")
        model, _ = load_pretrained(folder, fast=fast)
    return embedder(model)


def plain(config: UltraConfig) -> TormentedBertFrankenstein:
    """The same model with its weights as they are, in FP32."""
    torch.manual_seed(0)
    model = TormentedBertFrankenstein(config).eval()
    for layer in model.modules():
        if isinstance(layer, BitLinear):
            layer.ternary = False
    return model


def bert(config: UltraConfig, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.hidden_size,
    )
    return transformers.BertModel(shape, add_pooling_layer=False).eval()


def onnx_sessions(model: torch.nn.Module) -> dict[str, Embed]:
    """BERT in ONNX Runtime, FP32 and with its dynamic int8 quantisation, on as many threads as torch has."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=ids).last_hidden_state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found: dict[str, Embed] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain_file, int8_file = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        names: dict[str, Any] = {"input_names": ["ids"], "output_names": ["hidden"]}
        rows = torch.ones(2, 16, dtype=torch.int64)
        torch.onnx.export(
            Hidden(), (rows,), plain_file, dynamic_axes={"ids": {0: "b", 1: "t"}, "hidden": {0: "b", 1: "t"}},
            opset_version=17, dynamo=False, **names,
        )  # fmt: skip
        quantize_dynamic(plain_file, int8_file, weight_type=QuantType.QInt8)
        for name, file in (("BERT ONNX FP32", plain_file), (ONNX_INT8, int8_file)):
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

            def embed(ids: torch.Tensor, session: Any = session) -> torch.Tensor:
                return torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0]).mean(1)

            found[name] = embed
    return found


def seconds(embed: Embed, ids: torch.Tensor, clock: Callable[[], float]) -> float:
    """Time of one call, of as many as take a while."""
    started, calls = clock(), 0
    while (passed := clock() - started) < ENOUGH:
        embed(ids)
        calls += 1
    return passed / calls


def product_share(embed: Embed, ids: torch.Tensor, clock: Callable[[], float]) -> float:
    """Share of a packed model's time that its integer products take, quantising included."""
    multiply, inside = packed_layers.ternary_inference, [0.0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        result = multiply(*args, **kwargs)
        inside[0] += clock() - started
        return result

    packed_layers.ternary_inference = timed
    try:
        embed(ids)
        inside[0], started = 0.0, clock()
        embed(ids)
        return inside[0] / (clock() - started)
    finally:
        packed_layers.ternary_inference = multiply


def measure(
    name: str, rounds: int, clock: Callable[[], float], compiled: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    candidates = build(name, compiled)
    generator = torch.Generator().manual_seed(0)
    rows, figures = [], {}
    print(f"\n{name}, embeddings a second")
    for shape, (batch, tokens) in SHAPES.items():
        ids = torch.randint(5, 50_000, (batch, tokens), generator=generator)
        times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        for round_ in range(rounds + 1):
            for candidate, embed in candidates.items():
                taken = seconds(embed, ids, clock)
                if round_:
                    times[candidate].append(taken)
        rate = {candidate: batch / median(values) for candidate, values in times.items()}
        print(f"  {shape:24}{'a second':>10}{'fast packed is':>20}")
        for candidate, value in rate.items():
            print(f"  {candidate:24}{value:10.1f}{rate[FAST] / value:19.2f}x")
        figures[f"product_share@{name}@{batch}x{tokens}"] = share = product_share(candidates[OURS], ids, clock)
        print(f"  of packed ternary's time, {share:.0%} are integer products and quantising")
        both = [candidates[each](ids) for each in (FAST, OURS)]
        figures[f"fast_cosine@{name}@{batch}x{tokens}"] = cosine = torch.cosine_similarity(*both).min().item()
        print(f"  vectors of the fast one and the other have cosines of at least {cosine:.6f}")
        rows.append({"model": name, "shape": shape, "embeddings_per_s": rate, "seconds": times})
        suffix = name if batch > 1 else f"{name}@single"
        others = {PLAIN: "fp32", COMPILED: "compiled", "BERT FP32": "bert_fp32", "BERT bf16": "bert_bf16"}
        for other, key in (others | {ONNX_INT8: "onnx_int8"}).items():
            if other in rate:
                figures[f"ternary_vs_{key}@{suffix}"] = rate[OURS] / rate[other]
                figures[f"fast_vs_{key}@{suffix}"] = rate[FAST] / rate[other]
    return rows, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="mini only, two rounds")
    parser.add_argument("--compiled", action="store_true", help="also FP32 through torch.compile: minutes more")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds of one thread")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    print(default_plan(torch.device("cpu")))
    rows, figures = [], {}
    with torch.inference_mode():
        for name in ["mini"] if arguments.quick else arguments.models:
            more, found = measure(name, 2 if arguments.quick else arguments.rounds, clock, arguments.compiled)
            rows += more
            figures |= found
            gc.collect()
    machine = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if arguments.cpu_time else "wall",
        "allocator": ALLOCATOR,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"benchmark": "inference", "machine": machine, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
