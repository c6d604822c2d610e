"""Lengths of traces: quantiles by teacher as a table, histograms as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from store.errors import EngineError, StoreError, UserError
from store.format.files import whole_file
from store.reader import TraceStore
from store.reports.sql import StoreSql
from store.terminal.tables import plain_table

Lengths = Mapping[tuple[str, str], Sequence[int]]
"""(teacher, `verified` or `other`) -> lengths, ascending; a kind without a trace is missing."""

UNITS = ("tokens", "chars")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

COLOURS = {"verified": "#0072b2", "other": "#e69f00"}
"""Okabe-Ito: colour-blind readers can distinguish them."""

_LENGTHS = """
    SELECT teacher, if(is_correct, 'verified', 'other') AS kind, list({length} ORDER BY {length}) AS lengths
    FROM {traces} WHERE {length} > 0 GROUP BY ALL ORDER BY teacher, kind DESC
"""


def lengths(store: TraceStore, unit: str) -> Lengths:
    """Returns lengths by teacher, in the teacher's own tokens or in characters.

    Traces whose tokens were never counted (an import without a tokenizer) have no length in tokens.
    Raises UserError for another unit than UNITS, and StoreError when no trace can be measured.
    """
    if unit not in UNITS:
        raise UserError(f"--unit {unit}: one of {', '.join(UNITS)}")
    if unit == "tokens":
        rows = store.index.rows(_LENGTHS.format(length="n_tokens", traces="idx.traces"))
    else:
        with StoreSql(store) as sql:
            rows = sql.query(_LENGTHS.format(length="length(text)", traces="traces")).dicts()
    if not rows:
        hint = "; its tokens were never counted, --unit chars measures the texts" if unit == "tokens" else ""
        raise StoreError(f"{store.path} has no trace to measure{hint}")
    return {(row["teacher"], row["kind"]): row["lengths"] for row in rows}


def length_rows(found: Lengths) -> list[dict[str, Any]]:
    """Returns a row a teacher and kind: teacher, traces (the kind), count, min, p5 to p95, max, mean."""
    rows = []
    for (teacher, kind), values in found.items():
        quantiles = np.quantile(values, QUANTILES).tolist()
        named = {f"p{round(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
        ends = {"count": len(values), "min": values[0], **named, "max": values[-1], "mean": fmean(values)}
        rows.append({"teacher": teacher, "traces": kind, **ends})
    return rows


def lengths_table(rows: Sequence[Mapping[str, Any]], unit: str) -> Table:
    """Returns the rows of `length_rows`."""
    names = [name for name in rows[0] if name not in ("teacher", "traces")]
    table = plain_table(f"{unit} of a trace", text=["teacher", "traces"], numbers=names)
    for row in rows:
        table.add_row(row["teacher"], row["traces"], *(f"{row[name]:,.0f}" for name in names))
    return table


def plot_lengths(found: Lengths, unit: str, path: Path) -> None:
    """Plots a histogram a teacher, verified traces below the others, on one scale.

    The longest 1 % of all traces share the last bar; a dashed line is the median of the verified ones.
    Raises EngineError without matplotlib, and StoreError for a path that cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineError('a PNG needs matplotlib: pip install "ampo[plot]"') from None
    teachers = sorted({teacher for teacher, _ in found})
    figure = Figure(figsize=(9, 0.9 + 1.9 * len(teachers)), layout="constrained")
    FigureCanvasAgg(figure)
    edges = bin_edges([length for values in found.values() for length in values])
    panels = figure.subplots(len(teachers), 1, sharex=True, squeeze=False)[:, 0]
    for axes, teacher in zip(panels, teachers, strict=True):
        kinds = {kind: found.get((teacher, kind), ()) for kind in COLOURS}
        _plot(axes, teacher, kinds, edges)
    panels[-1].set_xlabel(f"{unit} of a trace (the longest 1 % of all: in the last bar)", fontsize=9)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def bin_edges(values: Sequence[int], bins: int = 40) -> list[float]:
    """Returns ascending edges of at most `bins` equal bins, whole numbers apart, from the shortest length to
    the 99 % quantile."""
    low, high = min(values), float(np.quantile(values, 0.99))
    width = max(1, math.ceil((high - low + 1) / bins))
    return [float(low + width * number) for number in range(math.ceil((high - low + 1) / width) + 1)]


def _plot(axes: Any, teacher: str, kinds: Mapping[str, Sequence[int]], edges: Sequence[float]) -> None:
    last = edges[-1] - 0.5
    clipped = [[min(length, last) for length in values] for values in kinds.values()]
    labels = [f"{kind} ({len(values):,})" for kind, values in kinds.items()]
    axes.hist(clipped, bins=list(edges), stacked=True, color=list(COLOURS.values()), label=labels)
    axes.set_title(teacher, fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    if kinds["verified"]:
        middle = float(np.median(kinds["verified"]))
        axes.axvline(middle, color="black", linewidth=1, linestyle="--", label=f"median {middle:,.0f}")
    axes.legend(fontsize=8, frameon=False)
