"""Curves of one or several runs: as a PNG and as a line of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from store.errors import EngineError
from trainer.reports.inspection import curve

Rows = Sequence[dict[str, Any]]

PANELS = {
    "accuracy": "solved samples of the student",
    "groups/all_fail": "groups whose samples all fail",
    "eval/pass@1": "held-out pass@1",
    "entropy": "entropy (nats)",
    "completions/mean_length": "response length (tokens)",
    "seconds/step": "seconds per step",
}
"""Metric -> title of its panel; the first three are shares."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe-Ito, which colour-blind readers can distinguish."""
STYLES = ("-", "--", ":", "-.")
"""Line styles; the next one begins when all colours are used."""
MARKED = 30
"""Curves of at most this many points mark each of them."""
SMOOTHED = 60
"""Longer curves are faint, with their running mean over a twentieth of the points on top."""
BLOCKS = "▁▂▃▄▅▆▇█"


def plot_runs(runs: Mapping[str, Rows], path: Path) -> None:
    """Writes `figure_of` as a PNG. EngineError without matplotlib."""
    figure_of(runs).savefig(path, dpi=110)


def figure_of(runs: Mapping[str, Rows]) -> Any:
    """Returns a matplotlib figure of six panels over steps, with one colour per run and one legend."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineError('a PNG needs matplotlib: pip install "ampo[plot]"') from None
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (metric, title) in enumerate(PANELS.items()):
        axes: Any = figure.add_subplot(2, 3, index + 1)
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("step", fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if index < 3:
            axes.set_ylim(-0.02, 1.02)
        for run, rows in enumerate(runs.values()):
            _plot(axes, *curve(rows, metric), run)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
    _add_legend(figure, list(runs))
    return figure


def _look(run: int) -> dict[str, Any]:
    return {"color": COLOURS[run % len(COLOURS)], "linestyle": STYLES[run // len(COLOURS) % len(STYLES)]}


def _plot(axes: Any, steps: Sequence[int], values: Sequence[float], run: int) -> None:
    if len(steps) > SMOOTHED:
        axes.plot(steps, values, linewidth=1, alpha=0.3, **_look(run))
        values = running_mean(values, len(values) // 20)
    if steps:
        marker = "o" if len(steps) <= MARKED else None
        axes.plot(steps, values, linewidth=1.8, marker=marker, markersize=3.5, **_look(run))


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Returns each value's mean with up to `width` neighbours on either side, fewer at the ends."""
    means = []
    for index in range(len(values)):
        reach = min(width, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _add_legend(figure: Any, names: Sequence[str]) -> None:
    """Adds a legend below all panels, in as many columns as the names leave room for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_look(run)) for run in range(len(names))]
    columns = max(1, min(len(names), 130 // (max(map(len, names), default=0) + 8)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=11, frameon=False)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Returns the curve as at most `width` characters, each the mean of its share of the values."""
    width = min(width, len(values))
    cut = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in cut]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)
