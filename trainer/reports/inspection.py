"""Reads a run back without torch: its metrics, and the store queries with their candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from store.errors import RunError, UserError

Rows = Sequence[dict[str, Any]]


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
        teacher: only queries for which this teacher had a candidate; a UserError where it never had one.
    """
    name = "step-*.parquet" if step is None else f"step-{step:06d}.parquet"
    files = sorted((run / "queries").glob(name))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    chosen = {
        (row["step"], row["problem_id"])
        for row in rows
        if row["problem_id"].startswith(problem or "") and teacher in (None, row["teacher"])
    }
    if teacher is not None and not chosen:
        _check_teacher(run, teacher)
    rows = [row for row in rows if (row["step"], row["problem_id"]) in chosen]
    return sorted(rows, key=lambda row: (row["step"], row["problem_id"], row["rank"] or 0))


def _check_teacher(run: Path, teacher: str) -> None:
    files = (run / "queries").glob("step-*.parquet")
    names = {name for file in files for name in pq.read_table(file, columns=["teacher"])[0].to_pylist()}
    if teacher not in names:
        known = ", ".join(sorted(names - {None})) or "none"
        raise UserError(f"--teacher {teacher}: no query of {run} found one of its traces; teachers: {known}")


def curve(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, where it exists."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]
