"""Records of what a precompute run would do and of what it did, for the command line to show."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from precompute.config import AnswerForm
from precompute.run.probe import Probe
from store.reader import TraceStore
from store.records import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPlan:
    """One teacher's share of a plan."""

    name: str
    engine: str
    """Resolved."""
    sample_budget: int
    """Upper bound of samples for one problem."""
    samples_stored: int
    """Samples of these problems that the store already has."""
    usable_stored: int
    """Usable ones among them: verified and not filtered."""
    samples_left: int
    """With `until_verified` an upper bound."""
    most_tokens: int
    """Upper bound: samples_left * max_tokens."""
    longest_prompt: int
    """Length in the teacher's tokens, over all problems."""
    first_prompt: str
    """Prompt of the first problem, as the teacher sees it."""
    opens_think: bool
    """True if that prompt ends inside a `<think>` block."""
    answer_form: AnswerForm
    """Form in which the answer to that prompt is searched."""
    probe: Probe | None = None
    """Measurements; None without a probe, or when no sample is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemsSummary:
    """Counts of the problem file's rows."""

    path: str
    rows: int
    duplicates: int
    """Rows that repeat an earlier one."""
    unparseable: tuple[Problem, ...]
    """Problems left out because their gold answer cannot be parsed."""
    used: int
    """Problems for the teachers to solve."""
    shard: str | None = None
    """E.g. `3/16`: only the problems of that shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputePlan:
    """Contents of `--dry-run`."""

    problems: ProblemsSummary
    store: str
    store_exists: bool
    first_problem: Problem
    teachers: tuple[TeacherPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOutcome:
    """One teacher's traces of the chosen problems, from all runs, and the cost of this run."""

    name: str
    new_samples: int
    """Samples of this run."""
    new_tokens: int
    seconds: float
    """Duration of this run for this teacher, loading included."""
    problems: int = 0
    """Problems with a trace of this teacher."""
    samples: int = 0
    verified: int = 0
    filtered: int = 0
    """Verified ones that a filter rejects."""
    tokens: int = 0
    """Sum over all samples, in the teacher's own tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeReport:
    """Final report of `ampo precompute teachers`."""

    problems: ProblemsSummary
    store: str
    teachers: tuple[TeacherOutcome, ...]
    coverage: tuple[int, ...]
    """[T + 1]: entry n counts the chosen problems with a usable trace of exactly n of the store's T teachers;
    sums to `problems.used`."""


_COUNTS = """
    SELECT teacher, count(DISTINCT problem_id) AS problems, count(*) AS samples,
           count(*) FILTER (is_correct) AS verified,
           count(*) FILTER (is_correct AND NOT is_usable) AS filtered, sum(n_tokens)::BIGINT AS tokens
    FROM idx.traces WHERE problem_id IN (SELECT unnest($problem_ids::VARCHAR[]))
    GROUP BY teacher
"""

_COVERING = """
    SELECT teachers, count(*) AS problems FROM (
        SELECT count(DISTINCT teacher) AS teachers
        FROM idx.traces WHERE is_usable AND problem_id IN (SELECT unnest($problem_ids::VARCHAR[]))
        GROUP BY problem_id)
    GROUP BY teachers
"""


def stored_counts(path: str | Path, problems: Sequence[Problem]) -> defaultdict[str, Counter[str]]:
    """Returns teacher -> counts of TeacherOutcome, over the traces of these problems."""
    with TraceStore(path) as store:
        rows = store.index.rows(_COUNTS, {"problem_ids": [problem.problem_id for problem in problems]})
    return defaultdict(Counter, {row.pop("teacher"): Counter(row) for row in rows})


def coverage(path: str | Path, problems: Sequence[Problem]) -> tuple[int, ...]:
    """Returns PrecomputeReport.coverage."""
    with TraceStore(path) as store:
        rows = store.index.rows(_COVERING, {"problem_ids": [problem.problem_id for problem in problems]})
        teachers = len(store.teachers())
    by_count: Mapping[int, int] = {row["teachers"]: row["problems"] for row in rows}
    most = max(teachers, *by_count, 0)
    uncovered = len(problems) - sum(by_count.values())
    return (uncovered, *(by_count.get(count, 0) for count in range(1, most + 1)))
