"""Reads a run back without torch: its metrics, and the store queries with their candidates."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from precompute.config_file import load_config, read_toml
from store.errors import RunError, UserError
from store.records import Problem

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
    return sorted(rows, key=lambda row: (row["step"], row["problem_id"], row["rank"] or math.inf))


def _check_teacher(run: Path, teacher: str) -> None:
    files = (run / "queries").glob("step-*.parquet")
    names = {name for file in files for name in pq.read_table(file, columns=["teacher"])[0].to_pylist()}
    if teacher not in names:
        known = ", ".join(sorted(names - {None})) or "none"
        raise UserError(f"--teacher {teacher}: no query of {run} found one of its traces; teachers: {known}")


def problems_of(run: Path, wanted: Collection[str]) -> dict[str, Problem]:
    """Returns problem_id -> problem, of the run's store or else of its training file; some may be missing."""
    from precompute.problems.problem_files import configured_problems
    from store.reader import TraceStore
    from trainer.config import Config

    found = {}
    with suppress(UserError), TraceStore(_store_of(run)) as store:
        found = {problem.problem_id: problem for problem in store.problems()}
    if not found.keys() >= set(wanted):
        with suppress(UserError):
            given = load_config(Config, str(run / "config.toml"), []).problems
            loaded = configured_problems(given, given.train, key="problems.train")
            found |= {problem.problem_id: problem for problem in loaded.problems}
    return found


def stored_texts(run: Path, problem_ids: Collection[str]) -> dict[str, str]:
    """Returns trace_id -> text of the problems' traces in the run's store; none where it cannot be read."""
    from store.reader import TraceStore

    with suppress(UserError), TraceStore(_store_of(run)) as store:
        found = store.candidates(list(problem_ids)).values()
        return {trace.trace_id: trace.text for traces in found for trace in traces}
    return {}


def _store_of(run: Path) -> str:
    path: str = read_toml(run / "config.toml")["store"]["path"]
    return path


def curve(rows: Rows, key: str, *, over: str = "step") -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, where it exists."""
    points = [(row[over], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]
