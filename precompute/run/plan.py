"""What a precompute run would do, and what it has done: plain records for the command line to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from precompute.config import AnswerForm
from precompute.run.probe import Expectation, Probe
from store.reader import TraceStore
from store.records import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPlan:
    """What one teacher would do."""

    name: str
    model: str
    engine: str
    """Resolved: `vllm` or `transformers`."""
    sample_budget: int
    """Samples of a problem, at most."""
    samples_there: int
    """Of these problems, in the store already."""
    usable_there: int
    """Of those: verified, and held back by no filter."""
    problems_left: int
    """Problems that still get samples."""
    samples_left: int
    """With `until_verified` at most this many."""
    longest_prompt: int
    """In the teacher's tokens, over all problems."""
    most_tokens: int
    """samples_left * max_tokens: no more than this is drawn."""
    weight_bytes: int | None
    """Size of the weight files; None for a model that is not a local directory."""
    first_prompt: str
    """The first problem's, as the teacher will see it."""
    opens_think: bool
    """That prompt ends inside a `<think>` block."""
    answer_form: AnswerForm
    """In which the answer to that prompt is looked for."""
    probe: Probe | None = None
    """What a probe measured; None without one, or when nothing is left to draw."""
    least: Expectation | None = None
    """With a probe: what is to be expected if all problems are equally hard."""
    most: Expectation | None = None
    """With a probe: the same if each problem is solved always or never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemsSummary:
    """What became of the problem file's rows."""

    path: str
    rows: int
    duplicates: int
    """Rows that repeat an earlier one."""
    unparseable: tuple[Problem, ...]
    """Left out: their gold answer cannot be parsed."""
    used: int
    """Problems that teachers are to solve."""
    shard: str | None = None
    """`3/16`: these are the problems of that shard alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputePlan:
    """What `--dry-run` shows."""

    problems: ProblemsSummary
    store: str
    store_exists: bool
    first_problem: Problem
    teachers: tuple[TeacherPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOutcome:
    """One teacher's traces of the chosen problems, this run's and earlier ones', and what this run cost."""

    name: str
    model: str
    engine: str
    new_samples: int
    """Drawn in this run."""
    new_tokens: int
    seconds: float
    """That this run took with this teacher, loading included."""
    problems: int = 0
    """Problems with a trace of it."""
    samples: int = 0
    verified: int = 0
    filtered: int = 0
    """Of the verified: held back by a filter."""
    tokens: int = 0
    """In the teacher's own tokens, all samples together."""

    @property
    def verified_share(self) -> float:
        """Verified samples among all, in [0, 1]."""
        return self.verified / self.samples if self.samples else 0.0

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample."""
        return self.tokens / self.samples if self.samples else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeReport:
    """What `ampo precompute teachers` ends with."""

    problems: ProblemsSummary
    store: str
    teachers: tuple[TeacherOutcome, ...]
    coverage: tuple[int, ...]
    """[T + 1]: the n-th is how many of the chosen problems have a usable trace (verified, not filtered) of
    exactly n teachers, of all T that the store knows; sums to `problems.used`."""


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


def stored_counts(store: TraceStore, problem_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By teacher the counts of TeacherOutcome; one without a trace of these is not in it."""
    rows = store.index.rows(_COUNTS, {"problem_ids": list(problem_ids)})
    return {row.pop("teacher"): row for row in rows}


def coverage(store: TraceStore, problem_ids: Sequence[str]) -> tuple[int, ...]:
    """PrecomputeReport.coverage"""
    rows = store.index.rows(_COVERING, {"problem_ids": list(problem_ids)})
    by_count: Mapping[int, int] = {row["teachers"]: row["problems"] for row in rows}
    most = max(len(store.teachers()), *by_count, 0)
    covered = sum(by_count.values())
    return (len(problem_ids) - covered, *(by_count.get(count, 0) for count in range(1, most + 1)))
