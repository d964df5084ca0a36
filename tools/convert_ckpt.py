"""Converts a DeepSpeed checkpoint (ZeRO-1, -2, -3; any number of ranks) into plain weights; needs no DeepSpeed.

python tools/convert_ckpt.py runs/mini-1 exported                           # newest checkpoint, safetensors
python tools/convert_ckpt.py runs/mini-1 exported --step best --format torch
python tools/convert_ckpt.py runs/mini-1 packed --format ternary             # a fifth of a byte per ternary weight
python tools/convert_ckpt.py runs/mini-1 hf --format hf --license cc-by-4.0 # AutoModel, SentenceTransformer, model card
python tools/convert_ckpt.py runs/mini-1/checkpoints/step-00000500 exported --force
python tools/convert_ckpt.py somewhere/global_step500 exported --config config.yaml --tokenizer tokenizer/

Exit codes: 0 done; 2 wrong usage or config; 3 data; 4 the checkpoint is damaged, incomplete, or failed verification.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from tbf.errors import run_program


def parse_arguments() -> argparse.Namespace:
    description, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="convert_ckpt.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="CHECKPOINT_OR_RUN", help="run folder, one of its checkpoints, or a bare one")
    add("out", type=Path, metavar="OUT", help="folder to write: weights, config.json, tokenizer, export.json")
    add(
        "--format",
        choices=("safetensors", "torch", "hf", "ternary"),
        default="safetensors",
        help="hf: for transformers and sentence-transformers; ternary: five weights a byte (default: %(default)s)",
    )
    add("--step", default="latest", metavar="N|best|latest", help="checkpoint of the run (default: %(default)s)")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prove equal logits against weights put together another way; write nothing otherwise (default: on)",
    )
    add("--force", action="store_true", help="replace an earlier export in OUT")
    add("--config", type=Path, metavar="FILE", help="config.yaml or config.json, for a checkpoint outside a run folder")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer folder or .model file, instead of the run's")
    add("--license", metavar="ID", help="licence of the weights for the model card of hf, e.g. apache-2.0")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from tbf.export.plain import EXPORT_NAME, export_run

    out = export_run(
        arguments.source,
        arguments.out,
        format=arguments.format,
        step=arguments.step,
        verify=arguments.verify,
        force=arguments.force,
        config=arguments.config,
        tokenizer=arguments.tokenizer,
        license=arguments.license,
    )
    facts = json.loads((out / EXPORT_NAME).read_text(encoding="utf-8"))
    report = facts["verified"]
    proof = f"verified: logits differ by at most {report['logits_max_abs_error']:.1e}" if report else "not verified"
    print(f"{out}: step {facts['step']}, {facts['parameters']:,} parameters, {_size(facts)}, {proof}")
    return 0


def _size(facts: dict[str, Any]) -> str:
    size = f"{facts['weight_bytes'] / 1e6:,.1f} MB"
    if ternary := facts.get("ternary"):
        size += f" ({ternary['bytes_per_weight']:.4f} bytes for each of {ternary['weights']:,} ternary weights)"
    return size


if __name__ == "__main__":
    sys.exit(run_program(main))
