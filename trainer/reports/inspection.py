"""Reads a run back: the store queries with their candidates, and the metric curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import duckdb

from trainer.run.run_dir import RunFiles

_QUERIES = """
    SELECT * FROM read_parquet($files)
    WHERE ($step::INT IS NULL OR step = $step)
      AND ($problem::VARCHAR IS NULL OR starts_with(problem_id, $problem))
      AND ($teacher::VARCHAR IS NULL OR (step, problem_id) IN (
            SELECT (step, problem_id) FROM read_parquet($files) WHERE teacher = $teacher))
    ORDER BY step, problem_id, rank
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One problem for which a step queried the store."""

    step: int
    problem_id: str
    latency_ms: float
    candidates: tuple[dict[str, Any], ...]
    """Rows of the queries file, best first; empty when the store had no trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySummary:
    """Totals over queries."""

    queries: int
    problems: int
    answered: int
    """Queries with at least one candidate."""
    used: int
    """Traces that entered a group."""
    share: dict[str, float]
    """teacher -> its share of the traces used."""
    median_latency_ms: float | None

    @property
    def hit_rate(self) -> float | None:
        """Share of queries that found a candidate; None without a query."""
        return self.answered / self.queries if self.queries else None


def query_rows(
    run: RunFiles, *, step: int | None = None, problem: str | None = None, teacher: str | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of the run's queries files, ordered by step, problem and rank.

    Args:
        problem: a problem_id or its beginning.
        teacher: only queries for which this teacher had a candidate.
    """
    files = sorted(str(path) for path in (run.root / "queries").glob("step-*.parquet"))
    if not files:
        return []
    with duckdb.connect() as connection:
        filters = {"files": files, "step": step, "problem": problem, "teacher": teacher}
        cursor = connection.execute(_QUERIES, filters)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def group_queries(rows: Sequence[dict[str, Any]]) -> list[Query]:
    """Groups rows by (step, problem)."""
    grouped: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["step"], row["problem_id"]), []).append(row)
    return [
        Query(
            step=step,
            problem_id=problem_id,
            latency_ms=candidates[0]["latency_ms"],
            candidates=tuple(row for row in candidates if row["trace_id"] is not None),
        )
        for (step, problem_id), candidates in grouped.items()
    ]


def summarize_queries(queries: Sequence[Query]) -> QuerySummary:
    """Computes the hit rate and each teacher's share of the traces used."""
    used = Counter(row["teacher"] for query in queries for row in query.candidates if row["selected"])
    latency_by_step = {query.step: query.latency_ms for query in queries}
    return QuerySummary(
        queries=len(queries),
        problems=len({query.problem_id for query in queries}),
        answered=sum(bool(query.candidates) for query in queries),
        used=used.total(),
        share={name: count / used.total() for name, count in sorted(used.items())},
        median_latency_ms=median(latency_by_step.values()) if latency_by_step else None,
    )


def curve(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, where it exists."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def evaluation_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns `step` and every eval/ metric of the steps that evaluated the student."""
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith("eval/")}
        for row in rows
        if any(key.startswith("eval/") for key in row)
    ]
