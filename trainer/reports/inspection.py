"""Reads a run back without torch: its metrics, and the store queries with their candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from store.errors import RunError

Rows = Sequence[dict[str, Any]]

_QUERIES = """
    SELECT * FROM read_parquet($files)
    WHERE ($step::INT IS NULL OR step = $step)
      AND ($problem::VARCHAR IS NULL OR starts_with(problem_id, $problem))
      AND ($teacher::VARCHAR IS NULL OR (step, problem_id) IN (
            SELECT (step, problem_id) FROM read_parquet($files) WHERE teacher = $teacher))
    ORDER BY step, problem_id, rank
"""


def open_run(path: str | Path | None = None) -> Path:
    """Returns the run's absolute directory, by default that of the last run below runs/, at any depth.

    Raises RunError when there is none.
    """
    if path is None:
        files = Path("runs").glob("**/metrics.jsonl")
        newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=Path("runs/metrics.jsonl"))
        path = newest.parent
    root = Path(path).absolute()
    if not (root / "config.toml").is_file():
        raise RunError(f"no run at {root} (no config.toml there); `ampo train` makes one")
    return root


def query_rows(
    run: Path, *, step: int | None = None, problem: str | None = None, teacher: str | None = None
) -> list[dict[str, Any]]:
    """Returns the candidates of the run's queries by step, problem and rank; a query without one is a row.

    Args:
        problem: a problem_id or its beginning.
        teacher: only queries for which this teacher had a candidate.
    """
    files = sorted(str(path) for path in (run / "queries").glob("step-*.parquet"))
    if not files:
        return []
    with duckdb.connect() as connection:
        filters = {"files": files, "step": step, "problem": problem, "teacher": teacher}
        cursor = connection.execute(_QUERIES, filters)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def curve(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, where it exists."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]
