"""Curves of one or several runs: as a PNG and as a line of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from store.errors import EngineError
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
"""Longer curves are faint, with their running mean over a twentieth of the points on top."""
BLOCKS = "▁▂▃▄▅▆▇█"


def figure_of(runs: Mapping[str, Rows]) -> Any:
    """Returns a matplotlib figure of six panels over steps, with one colour per run and one legend.

    Raises EngineError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise EngineError('a PNG needs matplotlib: pip install "ampo[plot]"') from None
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(runs)}
    for index, (metric, title) in enumerate(PANELS.items()):
        axes: Any = figure.add_subplot(2, 3, index + 1, title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        if index < 3:
            axes.set_ylim(-0.02, 1.02)
        for name, rows in runs.items():
            _plot(axes, *curve(rows, metric), colours[name])
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
    handles = [Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(handles, list(runs), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _plot(axes: Any, steps: Sequence[int], values: Sequence[float], colour: str) -> None:
    if len(steps) > SMOOTHED:
        axes.plot(steps, values, linewidth=1, alpha=0.3, color=colour)
        values = running_mean(values, len(values) // 20)
    if steps:
        axes.plot(steps, values, linewidth=1.8, color=colour, marker="o" if len(steps) < 30 else None)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Returns each value's mean with up to `width` neighbours on either side, fewer at the ends."""
    reaches = [min(width, index, len(values) - 1 - index) for index in range(len(values))]
    return [fmean(values[index - reach : index + reach + 1]) for index, reach in enumerate(reaches)]


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns a non-empty curve as at most `width` characters, each the mean of its share of the values."""
    means = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    span = (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[round((mean - min(means)) / span * (len(BLOCKS) - 1))] for mean in means)
