"""Lengths of traces: quantiles by teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from store.errors import StoreError, UserError
from store.reader import TraceStore
from store.reports.sql import StoreSql
from store.terminal.tables import plain_table

UNITS = {"tokens": "n_tokens", "chars": "length(text)"}
"""Unit -> its SQL over the view `traces`."""

_LENGTHS = """
    WITH measured AS (
        SELECT teacher, if(is_correct, 'verified', 'other') AS traces, {length} AS length
        FROM traces WHERE {length} > 0)
    SELECT teacher, traces, count(*) AS count, min(length) AS min, quantile_cont(length, 0.05) AS p5,
           quantile_cont(length, 0.25) AS p25, quantile_cont(length, 0.5) AS p50,
           quantile_cont(length, 0.75) AS p75, quantile_cont(length, 0.95) AS p95,
           max(length) AS max, avg(length) AS mean
    FROM measured GROUP BY ALL ORDER BY teacher, traces DESC
"""

Rows = Sequence[Mapping[str, Any]]


def length_rows(store: TraceStore, unit: str) -> list[dict[str, Any]]:
    """Returns a row a teacher and kind (`verified` or `other`): count, min, p5 to p95, max, mean.

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
    names = [name for name in rows[0] if name not in ("teacher", "traces")]
    return plain_table(
        f"{unit} of a trace",
        text=["teacher", "traces"],
        numbers=names,
        rows=([row["teacher"], row["traces"], *(round(row[name]) for name in names)] for row in rows),
    )
