"""The page: one file, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

import tbf
from tbf.evaluate.fill_mask import Candidate
from tbf.report.charts import draw
from tbf.report.history import History

Samples = Sequence[tuple[str, list[list[Candidate]]]]


def render(history: History, samples: Samples) -> str:
    """The whole page as HTML."""
    name = escape(history.folder.resolve().name)
    state = str(history.status.get("state", "unknown"))
    shade = state if state in ("done", "running", "stopped", "halted", "failed") else "unknown"
    charts = "".join(
        f"<figure><figcaption>{escape(chart.title)}<span>{escape(chart.unit)}</span></figcaption>{svg}</figure>"
        for chart, svg in draw(history)
    )
    parts = [
        f'<h1>{name}<span class="state {shade}">{escape(state)}</span></h1>',
        f'<p class="sub">{escape(_subtitle(history))}</p>',
        f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles(history))}</div>',
        f'<div class="charts">{charts}</div>',
        _results(history.results),
        _samples(samples),
        _settings(history),
    ]
    style = (resources.files("tbf.report") / "style.css").read_text(encoding="utf-8")
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · tbf</title><style>{style}</style></head><body><main>{''.join(parts)}"
        f"<footer>tbf {tbf.__version__}, {now}</footer></main></body></html>\n"
    )


def tiles(history: History) -> list[tuple[str, str]]:
    """(value, what it is) of the numbers that matter most."""
    found = []
    losses, accuracies = history.curve("val_loss")[1], history.curve("val_masked_accuracy")[1]
    if len(losses):
        best = f"validation loss, from {losses[0]:.2f}" if len(losses) > 1 else "validation loss"
        found.append((f"{losses[-1]:.3f}", best))
    elif (loss := history.last("loss")) is not None:
        found.append((f"{loss:.3f}", "training loss"))
    if len(accuracies):
        found.append((f"{accuracies[-1]:.1%}", "masked accuracy, held out"))
    total = history.config["train"].get("max_steps")
    step = history.last("step")
    found.append((f"{step:,.0f}", f"steps of {total:,}" if isinstance(total, int) else "steps"))
    if (tokens := history.last("tokens")) is not None:
        epoch = history.last("epoch")
        found.append((short(tokens), "tokens" + (f", {epoch:.2g} epochs" if epoch is not None else "")))
    rates = history.curve("tokens_per_s")[1]
    if len(rates):
        found.append((short(sorted(rates)[len(rates) // 2]), "tokens a second, median"))
    if skipped := history.last("skipped"):
        found.append((f"{skipped:,.0f}", "steps skipped by the guard"))
    return found


def short(number: float) -> str:
    """1234567 -> 1.23M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def _subtitle(history: History) -> str:
    model, data = history.config["model"], history.config["data"]
    parts = [f"preset {history.config['preset']}"]
    parts.append(f"{model.get('num_layers')} layers of {model.get('hidden_size')}, {model.get('num_loops')} loops")
    parts.append(f"data {data.get('source')}, rows of {data.get('seq_len')} tokens")
    if history.starts:
        last = history.starts[-1]
        cards = ", ".join(last.get("gpus") or []) or f"{last.get('cpu_cores')} CPU cores"
        parts.append(cards)
    if len(history.starts) > 1:
        parts.append(f"{len(history.starts)} starts")
    return " · ".join(parts)


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _results(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return ""
    texts = [
        [r["name"], f"{r['masked_tokens']:,}", f"{r['loss']:.3f}", f"{r['masked_accuracy']:.1%}",
         f"{r['pseudo_perplexity']:,.1f} ± {r['pseudo_perplexity_error']:,.1f}" if "pseudo_perplexity" in r else "–"]
        for r in results if r["kind"] == "text"
    ]  # fmt: skip
    tasks = [
        [r["task"], r["task_kind"], r["metric"], f"{r['test']['mean']:.3f} ± {r['test']['spread']:.3f}",
         f"{len(r['seeds'])}", f"{r['rows']['train']:,} / {r['rows']['test']:,}"]
        for r in results if r["kind"] == "task"
    ]  # fmt: skip
    parts = []
    if texts:
        head = ["text", "hidden tokens", "loss (nats)", "accuracy", "pseudo-perplexity"]
        parts.append(f"<h2>On text</h2>{_table(head, texts)}")
    if tasks:
        head = ["task", "kind", "metric", "test, mean ± spread", "seeds", "rows train / test"]
        parts.append(f"<h2>Fine-tuned</h2>{_table(head, tasks)}")
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="box"><table><tr>{top}</tr>{body}</table></div>'


def _samples(samples: Samples) -> str:
    boxes = []
    for text, masks in samples:
        for number, candidates in enumerate(masks, start=1):
            title = text if len(masks) == 1 else f"{text} (mask {number})"
            guesses = "".join(
                f'<div class="guess"><span>{escape(c.token)}</span><i style="--p:{c.probability:.1%}"></i>'
                f"<em>{c.probability:.1%}</em></div>"
                for c in candidates
            )
            boxes.append(f'<div class="box"><p>{escape(title)}</p>{guesses}</div>')
    return f'<h2>Filled masks</h2><div class="masks">{"".join(boxes)}</div>' if boxes else ""


def _settings(history: History) -> str:
    import yaml

    config = yaml.safe_dump(history.config, sort_keys=False, allow_unicode=True)
    parts = [f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"]
    if history.starts:
        starts = yaml.safe_dump(history.starts, sort_keys=False, allow_unicode=True)
        parts.append(
            f"<details><summary>Versions and hardware of each start</summary><pre>{escape(starts)}</pre></details>"
        )
    return "<h2>How it was run</h2>" + "".join(parts)
