"""Charts of the report page as coordinates in an SVG: curves over steps, and stacked shares. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Okabe-Ito, which colour-blind readers can distinguish; a ninth run has the first colour again."""
SMOOTHED = 60
"""Longer curves are faint, with their running mean over a tenth of the points on top."""

LEFT, RIGHT, TOP, BOTTOM = 48, 450, 10, 192
"""Edges of the plot in an SVG of 460 by 220; labels are outside."""
BARS = 40
"""At most so many bars: where a run has more steps, a bar is the sum over several."""

Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""


def line_chart(title: str, curves: Sequence[Curve], *, top: float = 0.0) -> dict[str, Any]:
    """Returns one line a curve, in their order; a long one is faint, under its running mean.

    Args:
        top: the y axis has at least 0 and this value.
    """
    values = [value for _, found in curves for value in found]
    if not values:
        return {"title": title, "lines": []}
    all_steps = [step for steps, _ in curves for step in steps]
    x_of, x_ticks = _axis(min(all_steps), max(all_steps), LEFT, RIGHT, whole=True)
    y_of, y_ticks = _axis(min(0.0, *values), max(top, *values), BOTTOM, TOP)

    def points(steps: Sequence[int], heights: Sequence[float]) -> list[tuple[float, float]]:
        return [(x_of(step), y_of(height)) for step, height in zip(steps, heights, strict=True)]

    lines = []
    for steps, found in curves:
        is_long = len(found) > SMOOTHED
        lines.append(
            {
                "points": points(steps, running_mean(found) if is_long else found),
                "faint": points(steps, found) if is_long else [],
                "steps": steps,
                "values": [float(f"{value:.4g}") for value in found],
            }
        )
    return {"title": title, "lines": lines, "x": x_ticks, "y": y_ticks}


def running_mean(values: Sequence[float]) -> list[float]:
    """Returns the mean over a tenth of the values around each."""
    reach = len(values) // 20
    padded = np.pad(values, reach, mode="edge")
    smooth: list[float] = np.convolve(padded, np.ones(2 * reach + 1) / (2 * reach + 1), mode="valid").tolist()
    return smooth


def stacked_chart(
    title: str, counts: Mapping[int, Mapping[str, int]], colours: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the shares of each name in bars over the steps, from the bottom in the order of `colours`."""
    if not counts:
        return {"title": title, "bars": []}
    first, last = min(counts), max(counts)
    width = math.ceil((last - first + 1) / BARS)
    sums: dict[int, Counter[str]] = {}
    for step, found in counts.items():
        sums.setdefault(step - (step - first) % width, Counter()).update(found)
    x_of, x_ticks = _axis(first, max(sums) + width, LEFT, RIGHT, whole=True)
    y_of, y_ticks = _axis(0.0, 1.0, BOTTOM, TOP)
    bars = []
    for begin, of_bar in sums.items():
        steps = f"step {begin}" if width == 1 else f"steps {begin} to {min(begin + width - 1, last)}"
        size, below = max(x_of(begin + width) - x_of(begin) - 1, 0.5), 0.0
        for name, colour in colours.items():
            share = of_bar[name] / of_bar.total()
            label = f"{steps}: {name} {share:.0%} ({of_bar[name]:,})"
            height = round(y_of(below) - y_of(below + share), 1)
            bar = {"x": x_of(begin), "y": y_of(below + share), "width": round(size, 1), "height": height}
            bars += [{**bar, "colour": colour, "label": label}] if share else []
            below += share
    return {"title": title, "bars": bars, "x": x_ticks, "y": y_ticks}


def _axis(
    low: float, high: float, begin: int, end: int, *, whole: bool = False
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Returns a function from value to coordinate, and the ticks, each a coordinate and a label.

    `begin` and `end` are the coordinates of `low` and `high`; `whole`: ticks at whole numbers only.
    """
    span = (high - low) or 1.0

    def coordinate(value: float) -> float:
        return round(begin + (value - low) / span * (end - begin), 1)

    unit = 10.0 ** math.floor(math.log10(span))
    gap = next(unit * share for share in (0.2, 0.5, 1, 2) if span / (unit * share) <= 6)
    gap = max(gap, 1.0) if whole else gap
    numbers = range(math.ceil(low / gap - 1e-9), math.floor((low + span) / gap + 1e-9) + 1)
    return coordinate, [(coordinate(gap * number), f"{gap * number:,.6g}") for number in numbers]
