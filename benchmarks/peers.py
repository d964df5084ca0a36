"""One training step of `mini` beside encoders that a user could train instead, in tokens per second.

    python benchmarks/peers.py [--quick] [--rounds 7]

`mini` visits 6 layers twice, so the peers have 12 layers of the same width: BERT and ModernBERT of Hugging Face
transformers, from their configs, with torch's fused AdamW and gradient clipping, in FP32 and under bf16 autocast.
ModernBERT predicts at masked positions only (`sparse_prediction`), as mini does. Same tokens, vocabulary of 50,000,
rows of 512, four rows a step. mini goes through DeepSpeed; the peers don't. Nothing is recomputed unless the name says
so.
All take turns in one run and medians are compared. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import train_step as own  # noqa: E402
import transformers  # noqa: E402

from tbf.ops.ternary_backends import DEFAULT_MODE  # noqa: E402
from tbf.system import processor_name  # noqa: E402
from tbf.train import distributed  # noqa: E402
from tbf.train.build_ops import prepare_ops  # noqa: E402
from tbf.train.environment import discover_process  # noqa: E402

Batch = dict[str, torch.Tensor]
VOCABULARY, WIDTH, LAYERS, HEADS = 50_000, 384, 12, 6


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def modernbert() -> torch.nn.Module:
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=3 * WIDTH // 2,
        max_position_embeddings=own.TOKENS,
        sparse_prediction=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return transformers.ModernBertForMaskedLM(config)


def dense(batch: Batch) -> Batch:
    """The batch as the peers want it: labels for every position, -100 where nothing is predicted."""
    labels = torch.full_like(batch["input_ids"], -100)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "labels": labels.scatter(1, batch["masked_positions"], batch["masked_labels"]),
    }


def plain_step(model: torch.nn.Module, batch: Batch, autocast: bool) -> Callable[[], None]:
    """A training step in plain PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    arguments = parser.parse_args()
    prepare_ops(needs_cpu_adam=True)
    distributed.start(discover_process(), on_cpu=True)
    try:
        bench = own.Bench("mini", bare=False)
        batch = dense(bench.batch)

        def mini(mode: str, granularity: str) -> Callable[[], None]:
            def step() -> None:
                bench.model.set_activation_checkpointing(granularity)
                bench.seconds(mode)

            return step

        steps = {
            "tbf mini int8": mini("int8", "none"),
            "tbf mini int8_hilo": mini("int8_hilo", "none"),
            f"tbf mini {DEFAULT_MODE}, layers recomputed": mini(DEFAULT_MODE, "layer"),
            "tbf mini fp32 fake-quant": mini(own.FAKE, "none"),
        }
        sizes = {"tbf mini": bench.model.num_parameters()}
        for name, build in (("BERT", bert), ("ModernBERT", modernbert)):
            for kind, autocast in (("fp32", False), ("bf16", True)):
                torch.manual_seed(0)
                model = build()
                sizes[name] = sum(p.numel() for p in model.parameters())
                steps[f"{name} {kind}"] = plain_step(model, batch, autocast)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(1 + (2 if arguments.quick else arguments.rounds)):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if round_:
                    times[name].append(time.perf_counter() - started)
    finally:
        distributed.stop()
    rate = {name: bench.tokens / median(values) for name, values in times.items()}
    ours = rate[f"tbf mini {DEFAULT_MODE}"]
    print("\nparameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()))
    print(f"{'':40}{'tokens/s':>10}{f'tbf {DEFAULT_MODE} is':>18}")
    for name, value in rate.items():
        print(f"{name:40}{value:10.0f}{ours / value:17.2f}x")
    figures = {"tbf_vs_bert_fp32": ours / rate["BERT fp32"], "tbf_vs_bert_bf16": ours / rate["BERT bf16"]}
    figures |= {f"tbf_vs_modernbert_{kind}": ours / rate[f"ModernBERT {kind}"] for kind in ("fp32", "bf16")}
    machine = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = [{"name": name, "tokens_per_s": value, "seconds": times[name]} for name, value in rate.items()]
    print(json.dumps({"benchmark": "peers", "machine": machine, "rows": rows, "figures": figures}))


if __name__ == "__main__":
    main()
