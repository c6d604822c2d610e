"""Counts of a store: plain records for `ampo inspect store`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from store.format.columns import TOKEN_COLUMNS
from store.format.manifest import Manifest
from store.format.parts import DamagedPart
from store.format.schema import PROBLEM_SCHEMA, table_of
from store.reader import TraceStore
from store.records import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherReport:
    """One teacher's traces."""

    teacher: str
    model: str | None
    """None when the teacher's record is missing."""
    problems: int
    """Problems with at least one trace of it."""
    covered: int
    """Problems with at least one usable trace of it."""
    traces: int
    verified: int
    filtered: int
    """Verified traces that a filter excludes."""
    verdicts: Mapping[str, int]
    """verdict -> traces; verdicts that do not occur are left out. A truncated response may be a `match` that
    is not verified."""
    tokens: int
    """Sum over all counted traces, in the teacher's own tokens."""
    verified_tokens: int
    uncounted: int
    """Traces without a count of tokens: imports without a tokenizer."""

    @property
    def verified_share(self) -> float:
        """Verified traces among all, in [0, 1]."""
        return self.verified / self.traces if self.traces else 0.0

    @property
    def mean_tokens(self) -> float | None:
        """Mean tokens of a counted trace; None without one."""
        counted = self.traces - self.uncounted
        return self.tokens / counted if counted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """Counts of the whole store."""

    path: str
    manifest: Manifest
    problems: int
    traces: int
    verified: int
    filtered: int
    """Verified traces that a filter excludes."""
    tokens: int
    parts: int
    bytes: int
    """Size of the readable parts."""
    teachers: tuple[TeacherReport, ...]
    """By name; registered ones without a trace included."""
    coverage: Mapping[int, int]
    """Number of teachers with a usable trace, 0 to T -> problems; sums to `problems`."""
    damaged: tuple[DamagedPart, ...]


_TEACHERS = """
    SELECT coalesce(t.teacher, r.name) AS teacher, any_value(r.model) AS model,
           count(DISTINCT problem_id) AS problems, count(DISTINCT problem_id) FILTER (is_usable) AS covered,
           count(trace_id) AS traces, count(*) FILTER (is_correct) AS verified,
           count(*) FILTER (is_correct AND NOT is_usable) AS filtered,
           coalesce(histogram(verdict), MAP {}) AS verdicts,
           coalesce(sum(n_tokens), 0)::BIGINT AS tokens,
           coalesce(sum(n_tokens) FILTER (is_correct), 0)::BIGINT AS verified_tokens,
           count(*) FILTER (n_tokens = 0) AS uncounted
    FROM (FROM idx.traces
          WHERE $chosen::VARCHAR[] IS NULL OR problem_id IN (SELECT unnest($chosen::VARCHAR[]))) AS t
    FULL JOIN registered AS r ON t.teacher = r.name GROUP BY 1 ORDER BY 1
"""

_PARTS = """
    SELECT count(*) AS parts, coalesce(sum(size), 0)::BIGINT AS bytes FROM idx.parts WHERE error IS NULL
"""

_PROBLEMS = """
    SELECT p.problem_id, p.question, p.answer, p.source, count(t.trace_id) AS traces,
           count(*) FILTER (t.is_correct) AS verified,
           count(*) FILTER (t.is_correct AND NOT t.is_usable) AS filtered,
           coalesce(list(DISTINCT t.teacher ORDER BY t.teacher) FILTER (t.is_usable), []) AS teachers
    FROM stored_problems AS p LEFT JOIN idx.traces AS t USING (problem_id)
    GROUP BY ALL
    HAVING NOT $uncovered OR count(*) FILTER (t.is_usable) = 0
    ORDER BY count(*) FILTER (t.is_usable), p.problem_id LIMIT $limit
"""


def teacher_reports(store: TraceStore, chosen: Sequence[str] | None = None) -> tuple[TeacherReport, ...]:
    """Returns the counts of every teacher, by name: over the chosen problem_ids, or for None over all."""
    records = store.teachers().values()
    registered = {"name": [each.name for each in records], "model": [each.model for each in records]}
    schema = pa.schema([("name", pa.string()), ("model", pa.string())])
    store.index.connection.register("registered", pa.table(registered, schema))
    return tuple(TeacherReport(**row) for row in store.index.rows(_TEACHERS, {"chosen": chosen}))


def store_report(store: TraceStore, chosen: Sequence[str] | None = None) -> StoreReport:
    """Returns counts by teacher, tokens, coverage: over the chosen problem_ids, or for None over all."""
    teachers = teacher_reports(store, chosen)
    covering = {row["problem_id"]: len(row["teachers"]) for row in problem_rows(store)}
    counts = list(covering.values()) if chosen is None else [covering[each] for each in chosen]
    parts = store.index.rows(_PARTS)[0]
    return StoreReport(
        path=str(store.path),
        manifest=store.manifest,
        problems=len(counts),
        traces=sum(teacher.traces for teacher in teachers),
        verified=sum(teacher.verified for teacher in teachers),
        filtered=sum(teacher.filtered for teacher in teachers),
        tokens=sum(teacher.tokens for teacher in teachers),
        parts=parts["parts"],
        bytes=parts["bytes"],
        teachers=teachers,
        coverage={count: counts.count(count) for count in range(len(teachers) + 1)},
        damaged=store.damaged,
    )


def problem_rows(
    store: TraceStore, *, uncovered: bool = False, limit: int | None = None
) -> list[dict[str, Any]]:
    """Returns a row a problem, hardest first.

    Columns: problem_id, question, answer, source, traces, verified, filtered (of the verified), teachers
    (with a usable trace). `uncovered`: only problems without a usable trace.
    """
    store.index.connection.register("stored_problems", table_of(store.problems(), PROBLEM_SCHEMA))
    return store.index.rows(_PROBLEMS, {"uncovered": uncovered, "limit": limit})


def trace_row(trace: Trace) -> dict[str, Any]:
    """Returns a row for tables and JSON: every column but the token ones, `created_at` in ISO 8601."""
    row = {name: value for name, value in asdict(trace).items() if name not in TOKEN_COLUMNS}
    return row | {"created_at": trace.created_at.isoformat()}
