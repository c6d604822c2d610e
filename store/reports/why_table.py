"""Why a trace has its verdict: gold and answer as they stand and as the verifier read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from store.reader import TraceStore
from store.reports.tables import plain_table
from store.terminal.table_forms import Fitting, fitting

SHOWN_CHARS = 200


def with_golds(store: TraceStore, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of traces (`report.trace_rows`), each with the `gold` answer of its problem; None without."""
    golds = {problem.problem_id: problem.answer for problem in store.problems()}
    return [{**row, "gold": golds.get(row["problem_id"])} for row in rows]


def why_table(rows: Sequence[Mapping[str, Any]]) -> Fitting:
    """Rows with their gold answers, side by side with what was read in them and why that is the verdict."""
    table = plain_table()
    for name in ("problem_id", "teacher", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("gold", "read as", "answer", "read as"):
        table.add_column(name, overflow="fold", min_width=7)
    table.add_column("why", overflow="fold", min_width=12)
    for row in rows:
        colour = "green" if row["is_correct"] else "red"
        texts = [row[name] for name in ("gold", "parsed_gold", "answer", "parsed_answer")]
        table.add_row(
            row["problem_id"],
            f"{escape(row['teacher'])}/{row['sample_index']}",
            f"[{colour}]{row['verdict']}[/]",
            *("[dim]-[/]" if text is None else escape(text[:SHOWN_CHARS]) for text in texts),
            escape(_why(row)),
            end_section=True,
        )
    return fitting(table, ("problem_id",))


def _why(row: Mapping[str, Any]) -> str:
    reasons = [row["verdict_detail"]]
    if row["verdict"] == "match" and not row["is_correct"]:
        reasons.append("not correct all the same: the response was cut")
    if row["filtered"]:
        reasons.append(f"filtered: {row['filtered']}")
    return "; ".join(reason for reason in reasons if reason)
