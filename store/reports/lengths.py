"""Lengths of traces: quantiles by teacher as a table, histograms as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from store.errors import EngineError, StoreError, UserError
from store.format.files import whole_file
from store.reader import TraceStore
from store.reports.sql import StoreSql
from store.terminal.tables import plain_table

UNITS = {"tokens": "n_tokens", "chars": "length(text)"}
"""Unit -> its SQL over the view `traces`."""

COLOURS = {"verified": "#0072b2", "other": "#e69f00"}
"""Okabe-Ito: colour-blind readers can distinguish them."""

_LENGTHS = """
    WITH measured AS (
        SELECT teacher, if(is_correct, 'verified', 'other') AS traces, {length} AS length
        FROM traces WHERE {length} > 0)
    SELECT teacher, traces, count(*) AS count, min(length) AS min, quantile_cont(length, 0.05) AS p5,
           quantile_cont(length, 0.25) AS p25, quantile_cont(length, 0.5) AS p50,
           quantile_cont(length, 0.75) AS p75, quantile_cont(length, 0.95) AS p95,
           max(length) AS max, avg(length) AS mean, list(length) AS lengths
    FROM measured GROUP BY ALL ORDER BY teacher, traces DESC
"""

Rows = Sequence[Mapping[str, Any]]


def length_rows(store: TraceStore, unit: str) -> list[dict[str, Any]]:
    """Returns a row a teacher and kind (`verified` or `other`): count, min, p5 to p95, max, mean, `lengths`.

    In the teacher's own tokens or in characters. Traces whose tokens were never counted (an import without a
    tokenizer) have no length in tokens.
    Raises UserError for another unit than UNITS, and StoreError when no trace can be measured.
    """
    if unit not in UNITS:
        raise UserError(f"--unit {unit}: one of {', '.join(UNITS)}")
    with StoreSql(store) as sql:
        rows = sql.query(_LENGTHS.format(length=UNITS[unit])).dicts()
    if not rows:
        raise StoreError(f"{store.path} has no trace with a length in {unit}; try --unit chars")
    return rows


def lengths_table(rows: Rows, unit: str) -> Table:
    """Returns the rows of `length_rows`."""
    names = [name for name in rows[0] if name not in ("teacher", "traces", "lengths")]
    table = plain_table(f"{unit} of a trace", text=["teacher", "traces"], numbers=names)
    for row in rows:
        table.add_row(row["teacher"], row["traces"], *(f"{row[name]:,.0f}" for name in names))
    return table


def plot_lengths(rows: Rows, unit: str, path: Path) -> None:
    """Plots a histogram a teacher, verified traces below the others, on one scale.

    The longest 1 % of all traces share the last bar; a dashed line is the median of the verified ones.
    Raises EngineError without matplotlib, and StoreError for a path that cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineError('a PNG needs matplotlib: pip install "ampo[plot]"') from None
    teachers = sorted({row["teacher"] for row in rows})
    figure = Figure(figsize=(9, 0.9 + 1.9 * len(teachers)), layout="constrained")
    FigureCanvasAgg(figure)
    everything = np.concatenate([row["lengths"] for row in rows])
    ends = float(everything.min()), float(np.quantile(everything, 0.99))
    panels = figure.subplots(len(teachers), 1, sharex=True, squeeze=False)[:, 0]
    for axes, teacher in zip(panels, teachers, strict=True):
        _plot(axes, [row for row in rows if row["teacher"] == teacher], ends)
    panels[-1].set_xlabel(f"{unit} of a trace (the longest 1 % of all: in the last bar)", fontsize=9)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _plot(axes: Any, rows: Rows, ends: tuple[float, float]) -> None:
    axes.hist(
        [np.clip(row["lengths"], *ends) for row in rows],
        bins=40,
        range=ends,
        stacked=True,
        color=[COLOURS[row["traces"]] for row in rows],
        label=[f"{row['traces']} ({row['count']:,})" for row in rows],
    )
    axes.set_title(rows[0]["teacher"], fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    if rows[0]["traces"] == "verified":
        middle = rows[0]["p50"]
        axes.axvline(middle, color="black", linewidth=1, linestyle="--", label=f"median {middle:,.0f}")
    axes.legend(fontsize=8, frameon=False)
