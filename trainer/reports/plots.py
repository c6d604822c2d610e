"""Curves of one or several runs as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from store.errors import EngineError, install_hint
from trainer.reports.inspection import Rows, curve

PANELS = {
    "accuracy": "solved samples of the student",
    "groups/all_fail": "groups whose samples all fail",
    "eval/pass@1": "held-out pass@1",
    "entropy": "entropy (nats)",
    "completions/mean_length": "response length (tokens)",
    "seconds/step": "seconds per step",
}
"""Metric -> title of its panel; the first three are shares."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Okabe-Ito, which colour-blind readers can distinguish; a ninth run has the first colour again."""
SMOOTHED = 60
"""Longer curves are faint, with their running mean over a tenth of the points on top."""


def figure_of(runs: Mapping[str, Rows]) -> Any:
    """Returns a matplotlib figure of six panels over steps, with one colour per run and one legend.

    Raises EngineError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineError(f"a PNG needs matplotlib: {install_hint('plot')}") from None
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    for index, (metric, title) in enumerate(PANELS.items()):
        axes: Any = figure.add_subplot(2, 3, index + 1, title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        if index < 3:
            axes.set_ylim(-0.02, 1.02)
        for (name, rows), colour in zip(runs.items(), cycle(COLOURS), strict=False):
            _plot(axes, rows, metric, colour, name)
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def running_mean(values: Sequence[float]) -> list[float]:
    """Returns the mean over a tenth of the values around each."""
    reach = len(values) // 20
    padded = np.pad(values, reach, mode="edge")
    smooth: list[float] = np.convolve(padded, np.ones(2 * reach + 1) / (2 * reach + 1), mode="valid").tolist()
    return smooth


def _plot(axes: Any, rows: Rows, metric: str, colour: str, name: str) -> None:
    steps, values = curve(rows, metric)
    if len(steps) > SMOOTHED:
        axes.plot(steps, values, linewidth=1, alpha=0.3, color=colour)
        values = running_mean(values)
    marker = "o" if len(steps) < 30 else None
    axes.plot(steps, values, linewidth=1.8, color=colour, marker=marker, label=name)
