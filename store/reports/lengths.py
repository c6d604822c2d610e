"""How long the traces are: quantiles by teacher as a table, histograms as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from store.errors import EngineError, StoreError, UserError
from store.format.files import whole_file
from store.reader import TraceStore
from store.reports.tables import plain_table
from store.reports.views import Views
from store.terminal.table_forms import Fitting, fitting

UNITS = ("tokens", "chars")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

VERIFIED, OTHER = "#0072b2", "#e69f00"
"""Okabe-Ito: told apart by colour-blind readers too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLengths:
    """One teacher's traces, each list ascending."""

    teacher: str
    verified: tuple[int, ...]
    other: tuple[int, ...]
    """Those that are not right."""

    @property
    def all(self) -> tuple[int, ...]:
        """Both, ascending."""
        return tuple(sorted(self.verified + self.other))


_TOKENS = """
    SELECT teacher, is_correct, list(n_tokens ORDER BY n_tokens) AS lengths
    FROM idx.traces WHERE n_tokens > 0 GROUP BY ALL
"""
_CHARS = """
    SELECT teacher, is_correct, list(length(text) ORDER BY length(text)) AS lengths
    FROM traces GROUP BY ALL
"""


def lengths(store: TraceStore, unit: str) -> list[TeacherLengths]:
    """By name of the teacher. Tokens are the teacher's own; traces whose tokens were never counted (an
    import without a tokenizer) are left out.

    Raises UserError for another unit than UNITS, and StoreError when nothing can be measured.
    """
    if unit not in UNITS:
        raise UserError(f"--unit {unit}: one of {', '.join(UNITS)}")
    if unit == "tokens":
        rows = store.index.rows(_TOKENS)
    else:
        with Views(store) as views:
            rows = views.query(_CHARS).dicts()
    found: dict[str, dict[bool, Sequence[int]]] = {}
    for row in rows:
        found.setdefault(row["teacher"], {})[row["is_correct"]] = row["lengths"]
    if not found:
        hint = "; its tokens were never counted, --unit chars measures the texts" if unit == "tokens" else ""
        raise StoreError(f"{store.path} has no trace to measure{hint}")
    return [
        TeacherLengths(teacher=name, verified=tuple(of.get(True, ())), other=tuple(of.get(False, ())))
        for name, of in sorted(found.items())
    ]


def length_rows(found: Sequence[TeacherLengths]) -> list[dict[str, Any]]:
    """A row a teacher and a kind of traces: teacher, traces (verified, other), count, min, mean, max and
    quantiles p5 to p95. A kind without a trace has no row."""
    return [
        {"teacher": of.teacher, "traces": kind, **_numbers(values)}
        for of in found
        for kind, values in (("verified", of.verified), ("other", of.other))
        if values
    ]


def _numbers(values: Sequence[int]) -> dict[str, float]:
    quantiles = np.quantile(values, QUANTILES).tolist()
    named = {f"p{round(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {"count": len(values), "min": values[0], **named, "max": values[-1], "mean": fmean(values)}


def lengths_table(rows: Sequence[Mapping[str, Any]], unit: str) -> Fitting:
    """What `length_rows` gave."""
    table = plain_table(f"{unit} of a trace")
    table.add_column("teacher", no_wrap=True)
    table.add_column("traces", no_wrap=True)
    names = [name for name in rows[0] if name not in ("teacher", "traces")]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["teacher"], row["traces"], *(f"{row[name]:,.0f}" for name in names))
    return fitting(table, ("min", "mean", "p25", "p75", "p5"))


def plot_lengths(found: Sequence[TeacherLengths], unit: str, path: Path) -> None:
    """A histogram a teacher, verified traces below the others, one scale for all; the longest 1 % of all
    traces share the last bar, a dashed line is the median of the verified ones.

    Raises EngineError without matplotlib, and StoreError for a path that cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineError('a PNG needs matplotlib: pip install "ampo[plot]"') from None
    figure = Figure(figsize=(9, 0.9 + 1.9 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    edges = bin_edges([length for of in found for length in of.all])
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, of in zip(panels, found, strict=True):
        _draw(axes, of, edges)
    panels[-1].set_xlabel(f"{unit} of a trace (the longest 1 % of all: in the last bar)", fontsize=9)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def bin_edges(values: Sequence[int], bins: int = 40) -> list[float]:
    """Ascending edges of at most `bins` equal bins, whole numbers apart, from the shortest to the 99 %
    quantile; what is longer belongs to the last."""
    low, high = min(values), float(np.quantile(values, 0.99))
    width = max(1, math.ceil((high - low + 1) / bins))
    return [float(low + width * number) for number in range(math.ceil((high - low + 1) / width) + 1)]


def _draw(axes: Any, of: TeacherLengths, edges: Sequence[float]) -> None:
    last = edges[-1] - 0.5
    clipped = [[min(length, last) for length in kind] for kind in (of.verified, of.other)]
    labels = [f"verified ({len(of.verified):,})", f"other ({len(of.other):,})"]
    axes.hist(clipped, bins=list(edges), stacked=True, color=[VERIFIED, OTHER], label=labels)
    axes.set_title(of.teacher, fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    if of.verified:
        middle = float(np.median(of.verified))
        axes.axvline(middle, color="black", linewidth=1, linestyle="--", label=f"median {middle:,.0f}")
    axes.legend(fontsize=8, frameon=False)
