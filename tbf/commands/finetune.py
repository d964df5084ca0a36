"""`tbf finetune`: how much a model helps on a labelled task."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from tbf.commands import add_verb
from tbf.errors import ConfigError

logger = logging.getLogger(__name__)

EXAMPLES = """\
  tbf finetune exported eval_es/pos_ud_gsd
  tbf finetune exported eval_es/ner_wikineural --max-train-rows 2000 --max-test-rows 2000 --epochs 4
  tbf finetune exported eval_es/acceptability_escola --learning-rate 5e-5 2e-4 1e-3 --seeds 5
  tbf finetune exported eval_es/sentiment_umsab --frozen --json
"""


def register(verbs: Any) -> None:
    parser = add_verb(
        verbs, "finetune", run, summary="fine-tune a model on a labelled task and score it", examples=EXAMPLES,
        about="A task is a folder with train, validation and test parquet files: words with tags ('tokens' and a list "
        "column), texts ('text' and 'label') or pairs ('sentence1', 'sentence2' and 'label' or 'score').",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="DIR", help="an export: `export/` of a run, or what convert_ckpt.py wrote")
    add("task", type=Path, metavar="TASK_DIR", help="folder of the task")
    add("--seeds", type=int, default=3, metavar="N", help="runs, of which mean and spread count (default: %(default)s)")
    add("--epochs", type=int, default=10, metavar="N", help="passes over train, at most (default: %(default)s)")
    add("--patience", type=int, default=3, metavar="N",
        help="stop after N epochs without a better validation score (default: %(default)s)")  # fmt: skip
    add("--learning-rate", type=float, nargs="+", default=[2e-4], metavar="X",
        help="peak; of several, validation chooses (default: 2e-4)")  # fmt: skip
    add("--batch-size", type=int, default=16, metavar="N", help="rows of a batch (default: %(default)s)")
    add("--max-length", type=int, metavar="N", help="cut rows to N tokens (default: as in training, else 512)")
    for split in ("train", "validation", "test"):
        add(f"--max-{split}-rows", type=int, metavar="N", help=f"take N random rows of {split} (default: all)")
    add("--metric", metavar="NAME", help="what counts (default: what the task's README says, else by its kind)")
    add("--frozen", action="store_true", help="train the head alone: quick, and what a ternary export does anyway")
    add("--json", action="store_true", help="one JSON object instead of tables")
    add("--out", type=Path, metavar="FILE", help="where the result goes (default: DIR/evaluation/TASK.json)")


def run(arguments: argparse.Namespace) -> int:
    from tbf.evaluate.metrics import require_libraries

    require_libraries()
    from tbf.commands.exports import load_with_tokenizer, training_length
    from tbf.evaluate.finetune import Tuning, finetune
    from tbf.evaluate.results import check_writable, result_path, save_result
    from tbf.evaluate.tasks import SPLITS, read_task
    from tbf.model.packed import is_packed

    export = Path(arguments.model)
    most = {split: getattr(arguments, f"max_{split}_rows") for split in SPLITS}
    for split, rows in most.items():
        if rows is not None and rows < 1:
            raise ConfigError(f"--max-{split}-rows {rows}: at least 1")
    model, tokenizer = load_with_tokenizer(arguments.model)
    frozen = arguments.frozen
    if is_packed(model) and not frozen:
        logger.warning(
            "%s is packed ternary and has no weights to train: only the head learns; for more, fine-tune an export in "
            "the format safetensors or hf", export,
        )  # fmt: skip
        frozen = True
    tuning = Tuning(
        learning_rates=tuple(arguments.learning_rate),
        epochs=arguments.epochs,
        patience=arguments.patience,
        batch_size=arguments.batch_size,
        max_length=training_length(export) if arguments.max_length is None else arguments.max_length,
        seeds=arguments.seeds,
        frozen=frozen,
    )
    task = read_task(arguments.task, arguments.metric, most)
    out = check_writable(arguments.out or result_path(export, task.name))
    logger.info(
        "%s: %s task, %s, %s rows", task.name, task.kind, f"{len(task.labels)} labels" if task.labels else "a number",
        " / ".join(f"{len(task.splits[split]):,}" for split in SPLITS),
    )  # fmt: skip
    result = {**finetune(model, tokenizer, task, tuning, progress=True), "frozen": frozen}
    save_result(out, result)
    print(json.dumps(result, ensure_ascii=False) if arguments.json else format_result(result))
    print(f"written to {out}", file=sys.stderr)
    return 0


def format_result(result: dict[str, Any]) -> str:
    """The result for people: the scores of every seed, and what was taken for what."""
    names = list(result["test_metrics"])
    alone = " (head alone)" if result["frozen"] else ""
    lines = [f"{result['task']}{alone}: test scores; {result['metric']} on validation chose the epoch"]
    lines.append(f"{'':10}" + "".join(f"{name:>12}" for name in names) + f"{'epochs':>9}")
    for seed in result["seeds"]:
        numbers = "".join(f"{seed['test'][name]:12.4f}" for name in names)
        lines.append(f"{'seed ' + str(seed['seed']):10}{numbers}{seed['epochs']:>9}")
    for part in ("mean", "spread"):
        lines.append(f"{part:10}" + "".join(f"{result['test_metrics'][name][part]:12.4f}" for name in names))
    table = result["confusion"]
    return "\n".join([*lines, *(_confusion_lines(table) if table else [])])


def _confusion_lines(confusion: dict[str, Any]) -> list[str]:
    """The table where it fits a terminal, with what each label scores; rows are right, columns were said."""
    labels, table, parts = confusion["labels"], confusion["table"], confusion["by_label"]
    shown = [label if len(label) <= 12 else f"{label[:11]}…" for label in labels]
    width, cell = max(8, *map(len, shown)) + 2, max(6, *(len(label) + 1 for label in shown))
    lines = [
        "",
        f"{'right, said:':{width}}" + "".join(f"{label:>{cell}}" for label in shown) + "  precision  recall     F1",
    ]
    for label, name, row in zip(labels, shown, table):
        scored = "".join(
            f"{parts[label][part]:>{size}.3f}" for part, size in (("precision", 11), ("recall", 8), ("f1", 7))
        )
        lines.append(f"{name:{width}}" + "".join(f"{count:>{cell}}" for count in row) + scored)
    return lines
