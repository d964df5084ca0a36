"""Curves of a run as SVG, drawn by matplotlib (extra `report`)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tbf.errors import ConfigError
from tbf.report.history import History

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea580c", "#059669", "#dc2626", "#94a3b8"
INK, GRID = "#334155", "#e2e8f0"
SMOOTHED_FROM = 40
"""Points from which a curve is drawn pale, with its running median on top."""


@dataclass(frozen=True)
class Line:
    """One column of the metrics in a chart."""

    column: str
    label: str
    color: str
    points: bool = False
    """Marks instead of a smoothed curve: for values that are rare."""
    factor: float = 1.0


@dataclass(frozen=True)
class Chart:
    """What is drawn together."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = False
    level: float | None = None
    """A value to compare with, as a dashed line."""
    svg: str = field(default="", compare=False)


def charts_of(history: History) -> tuple[Chart, ...]:
    """The charts for which the run has numbers, in reading order."""
    experts = history.config["model"].get("num_experts", 1)
    wanted = (
        Chart("Loss", "nats per masked token",
              (Line("loss", "training", BLUE), Line("val_loss", "validation", ORANGE, points=True))),
        Chart("Masked accuracy", "%",
              (Line("masked_accuracy", "training", BLUE, factor=100),
               Line("val_masked_accuracy", "validation", ORANGE, points=True, factor=100))),
        Chart("Learning rate", "", (Line("lr", "learning rate", GREEN),)),
        Chart("Gradient norm", "before clipping", (Line("grad_norm", "gradient norm", BLUE),), log=True,
              level=history.config["train"].get("gradient_clipping")),
        Chart("Throughput", "tokens a second", (Line("tokens_per_s", "tokens a second", GREEN),)),
        Chart("Memory", "GB",
              (Line("host_mem_gb", "host", BLUE), Line("device_mem_gb", "card", ORANGE))),
        Chart("Waiting for data", "% of a step", (Line("data_wait", "waiting", GREY, factor=100),)),
        Chart("Router load", "% of the assignments",
              (Line("expert_share_max", "busiest expert", RED, factor=100),
               Line("expert_share_min", "idlest expert", BLUE, factor=100)), level=100 / experts),
        Chart("Router entropy", "nats", (Line("router_entropy", "entropy", GREEN),), level=float(np.log(experts))),
        Chart("Card temperature", "°C", (Line("card_temperature_c", "temperature", RED),),
              level=history.config["train"].get("thermal_soft_c")),
    )  # fmt: skip
    return tuple(chart for chart in wanted if any(_has_numbers(history, line) for line in chart.lines))


def draw(history: History) -> Iterator[tuple[Chart, str]]:
    """Each chart with its SVG. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the report needs matplotlib, which is not installed: pip install 'tbf[report]'") from None
    for number, chart in enumerate(charts_of(history)):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for line in chart.lines:
            if _has_numbers(history, line):
                _draw_line(axes, history, line)
        _dress(axes, chart)
        yield chart, _svg(figure, f"chart{number}")


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running median over `width` neighbours, shorter at the ends: a spike bends nothing."""
    padded = np.pad(values, (width // 2, width - 1 - width // 2), constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def _has_numbers(history: History, line: Line) -> bool:
    values = history.curve(line.column)[1]
    return len(values) > 0 and (line.column != "device_mem_gb" or bool(values.any()))


def _draw_line(axes: Any, history: History, line: Line) -> None:
    steps, values = history.curve(line.column)
    values = values * line.factor
    if line.points:
        axes.plot(steps, values, "o-", color=line.color, label=line.label, markersize=4, linewidth=1.4, zorder=4)
    elif len(values) < SMOOTHED_FROM:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=line.color, label=line.label, linewidth=1.8, marker=marker)
    else:
        axes.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
        width = max(5, len(values) // 40)
        axes.plot(steps, smooth(values, width), color=line.color, label=line.label, linewidth=1.8)


def _dress(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

    if chart.level is not None:
        axes.axhline(chart.level, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    elif chart.title == "Throughput":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if not chart.log and chart.lines[0].column in ("tokens_per_s", "host_mem_gb", "data_wait", "lr"):
        axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_xlabel("step", color=INK, fontsize=9)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _svg(figure: Any, salt: str) -> str:
    """The figure as an element: text stays text, in the page's font; the same run gives the same bytes."""
    import matplotlib

    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": ["sans-serif"]}
    with matplotlib.rc_context(settings):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
