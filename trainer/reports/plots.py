"""Curves of one or several runs as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import EngineError
from trainer.reports.inspection import curve

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One metric of all runs."""

    metric: str
    title: str
    share: bool = False
    """Its values lie between 0 and 1."""


PANELS = (
    Panel(metric="accuracy", title="solved, of the student's own samples", share=True),
    Panel(metric="groups/all_fail", title="groups whose samples all fail", share=True),
    Panel(metric="eval/pass@1", title="held-out pass@1", share=True),
    Panel(metric="entropy", title="entropy (nats)"),
    Panel(metric="completions/mean_length", title="response length (tokens)"),
    Panel(metric="seconds/step", title="seconds a step"),
)

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe-Ito: told apart by colour-blind readers too."""
STYLES = ("-", "--", ":", "-.")
"""Of the lines, once the colours are used up."""

MARKED = 30
"""Curves of so few points show each of them."""
SMOOTHED = 60
"""Curves of more points are drawn faintly, and their running mean over a twentieth of them on top."""


def plot_runs(runs: Mapping[str, Rows], path: Path) -> None:
    """Draws `figure_of` into a PNG. EngineError without matplotlib."""
    figure_of(runs).savefig(path, dpi=110)


def figure_of(runs: Mapping[str, Rows]) -> Any:
    """Six panels over steps, a colour a run and one legend for all, as a matplotlib figure."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineError('a PNG needs matplotlib: pip install "ampo[plot]"') from None
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(PANELS, start=1):
        axes = figure.add_subplot(2, 3, place)
        _frame(axes, panel)
        for number, rows in enumerate(runs.values()):
            _draw(axes, *curve(rows, panel.metric), number)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
    _legend(figure, list(runs))
    return figure


def _frame(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=12)
    axes.set_xlabel("step", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.share:
        axes.set_ylim(-0.02, 1.02)


def _draw(axes: Any, steps: Sequence[int], values: Sequence[float], run: int) -> None:
    if not steps:
        return
    colour, style = COLOURS[run % len(COLOURS)], STYLES[run // len(COLOURS) % len(STYLES)]
    marker = "o" if len(steps) <= MARKED else None
    if len(steps) > SMOOTHED:
        axes.plot(steps, values, style, color=colour, linewidth=1, alpha=0.3)
        values = running_mean(values, len(values) // 20)
    axes.plot(steps, values, style, color=colour, linewidth=1.8, marker=marker, markersize=3.5)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Each value's mean with up to `width` neighbours on either side, fewer at the ends."""
    means = []
    for at in range(len(values)):
        reach = min(width, at, len(values) - 1 - at)
        around = values[at - reach : at + reach + 1]
        means.append(sum(around) / len(around))
    return means


def _legend(figure: Any, names: Sequence[str]) -> None:
    """Below all panels, in as many columns as the names leave room for."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[run % len(COLOURS)], linestyle=STYLES[run // len(COLOURS) % len(STYLES)])
        for run in range(len(names))
    ]
    columns = max(1, min(len(names), 130 // (max(map(len, names), default=0) + 8)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=11, frameon=False)


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
