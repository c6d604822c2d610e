"""Records of what a precompute run would do and of what it did, for the command line to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from precompute.run.probe import Probe
from store.reader import TraceStore
from store.records import AnswerForm, Problem, Trace
from store.reports.report import TeacherReport, teacher_reports


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
    left_out: int
    """Rows and problems that cannot be used."""
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

    stored: TeacherReport
    new_samples: int
    """Samples of this run."""
    new_tokens: int
    seconds: float
    """Duration of this run for this teacher, loading included."""
    unverified: tuple[Trace, Problem] | None = None
    """A sample that shows why none is verified, and its problem; None where one is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeReport:
    """Final report of `ampo precompute teachers`."""

    problems: ProblemsSummary
    store: str
    teachers: tuple[TeacherOutcome, ...]
    coverage: Mapping[int, int]
    """Number of teachers with a usable trace, 0 to T -> chosen problems; sums to `problems.used`."""


def typical_failure(
    store: TraceStore, teacher: str, problems: Sequence[Problem]
) -> tuple[Trace, Problem] | None:
    """Returns a sample with the most frequent verdict among those of the first problems, and its problem."""
    first = {problem.problem_id: problem for problem in problems[:50]}
    found = store.candidates(list(first), teachers=[teacher], usable=False)
    traces = [trace for each in found.values() for trace in each]
    verdicts = Counter(trace.verdict for trace in traces).most_common(1)
    return next(((t, first[t.problem_id]) for t in traces if t.verdict == verdicts[0][0]), None)


def stored_counts(path: str | Path, problems: Sequence[Problem]) -> dict[str, TeacherReport]:
    """Returns teacher -> counts of its traces of these problems."""
    with TraceStore(path) as store:
        reports = teacher_reports(store, [problem.problem_id for problem in problems])
    return {report.teacher: report for report in reports}
