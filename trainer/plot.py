"""Curves of one or several runs as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from store.errors import EngineError
from trainer.inspection import curve

PANELS = (
    ("reward", "reward (student samples)"),
    ("groups/all_fail", "groups where all samples fail"),
    ("eval/pass@", "held-out pass@k"),
    ("entropy", "entropy (nats)"),
    ("completions/mean_length", "response tokens"),
    ("store/queries", "problems asked for"),
)
"""Metric and the panel's title; one that ends in @ stands for all metrics that begin so, a line each."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe-Ito: told apart by colour-blind readers too."""


def plot_runs(runs: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Draws six panels over steps, a colour a run. Raises EngineError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineError('a PNG needs matplotlib: pip install "ampo[plot]"') from None
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (metric, title) in enumerate(PANELS, start=1):
        axes = figure.add_subplot(2, 3, panel)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.25)
        for colour, (name, rows) in zip(_colours(len(runs)), runs.items(), strict=True):
            _draw(axes, rows, metric, name, colour)
        if metric != "entropy" and "length" not in metric and "queries" not in metric:
            axes.set_ylim(-0.02, 1.02)
        if axes.lines and (panel == 1 or metric.endswith("@")):
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _draw(axes: Any, rows: Sequence[dict[str, Any]], metric: str, name: str, colour: str) -> None:
    family = metric.endswith("@")
    keys = sorted(
        {key for row in rows for key in row if key == metric or (family and key.startswith(metric))}
    )
    for key, style in zip(keys, ("-", "--", ":", "-."), strict=False):
        steps, values = curve(rows, key)
        label = f"{name} {key.removeprefix('eval/')}" if metric.endswith("@") else name
        axes.plot(steps, values, style, color=colour, label=label, linewidth=1.6)


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The curve as one line of text: each character the mean of its share of the values."""
    if not values:
        return ""
    width = min(width, len(values))
    cut = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in cut]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)
