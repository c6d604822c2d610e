"""Tables of `ampo precompute teachers` and `ampo store refilter`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from precompute.config import AnswerForm
from precompute.run.plan import PrecomputePlan, PrecomputeReport, ProblemsSummary, TeacherPlan
from precompute.run.probe import Expectation, Probe
from precompute.run.refilter import RefilterReport
from precompute.verify.final_answer import CLOSING, OPENING, find_answer, to_form
from store.reports.tables import coverage_table
from store.terminal.tables import plain_table


def report_tables(report: PrecomputeReport) -> Group:
    """Returns cost and result per teacher, and coverage."""
    table = plain_table(
        f"traces in {report.store}",
        text=["teacher"],
        numbers=["problems", "samples", "verified", "filtered", "tokens", "tokens/s", "time"],
    )
    for teacher in report.teachers:
        table.add_row(
            teacher.name,
            f"{teacher.problems:,}",
            f"{teacher.samples:,}",
            f"{teacher.verified_share:.1%}",
            f"{teacher.filtered:,}",
            f"{teacher.mean_tokens:.1f}",
            f"{teacher.new_tokens / teacher.seconds:,.0f}" if teacher.new_tokens else "-",
            f"{teacher.seconds:.1f} s",
        )
    return Group(
        Text(problems_line(report.problems)), table, coverage_table(dict(enumerate(report.coverage)))
    )


def plan_tables(plan: PrecomputePlan, *, student_form: AnswerForm) -> Group:
    """Returns the samples stored and left, their expected cost, and for each teacher the first prompt and the
    way its answers are read and rewritten for the student."""
    state = "" if plan.store_exists else " (would be made)"
    parts: list[RenderableType] = [
        Text(problems_line(plan.problems) + f"; store {plan.store}{state}"),
        _plan_table(plan),
    ]
    if any(teacher.probe for teacher in plan.teachers):
        parts += _probe_tables(plan)
    for teacher in plan.teachers:
        parts += [Text(f"first prompt of {teacher.name}:"), Text(teacher.first_prompt, style="cyan")]
        parts.append(Text(form_line(teacher, student_form, plan.first_problem.answer)))
    return Group(*parts)


def _plan_table(plan: PrecomputePlan) -> Table:
    table = plain_table(
        f"plan for {plan.store}",
        text=["teacher", "engine"],
        numbers=["samples", "there", "usable", "left", "tokens\nat most", "longest\nprompt", "weights"],
    )
    for teacher in plan.teachers:
        size = "-" if teacher.weight_bytes is None else f"{teacher.weight_bytes / 2**20:,.1f} MiB"
        table.add_row(
            teacher.name,
            teacher.engine,
            f"{plan.problems.used:,} x {teacher.sample_budget}",
            f"{teacher.samples_stored:,}",
            f"{teacher.usable_stored:,}",
            f"{teacher.samples_left:,}",
            short_count(teacher.most_tokens),
            f"{teacher.longest_prompt:,}",
            size,
        )
    return table


def _probe_tables(plan: PrecomputePlan) -> list[RenderableType]:
    """Returns the measurements, and the expectation for the samples that are left with its sum."""
    measured = plain_table("measured on a probe")
    expected = plain_table("expected for what is left")
    for table in (measured, expected):
        table.add_column("teacher", no_wrap=True)
    for name in ("samples", "verified", "usable", "tokens each", "tokens/s", "loading"):
        measured.add_column(name, justify="right")
    for name in ("samples", "tokens", "time", "disk"):
        expected.add_column(name, justify="right")
    both: list[tuple[Expectation, Expectation]] = []
    for teacher in plan.teachers:
        if teacher.probe and teacher.least and teacher.most:
            both.append((teacher.least, teacher.most))
            measured.add_row(teacher.name, *_probe_cells(teacher.probe))
            expected.add_row(teacher.name, *_expectation_cells(*both[-1:]))
        else:
            expected.add_row(teacher.name, "nothing")
    expected.add_section()
    expected.add_row("all", *_expectation_cells(*both))
    return [measured, expected]


def _probe_cells(probe: Probe) -> list[str]:
    return [
        f"{probe.samples:,}",
        f"{probe.verified / probe.samples:.1%}",
        f"{probe.usable_share:.1%}",
        f"{probe.mean_tokens:,.0f}",
        short_count(probe.tokens_per_second),
        short_time(probe.load_seconds),
    ]


def _expectation_cells(*both: tuple[Expectation, Expectation]) -> list[str]:
    """Returns sums of (least, most) over teachers: samples, tokens, time, disk; `a .. b` if they differ."""

    def cell(quantity: Callable[[Expectation], float], shown: Callable[[float], str]) -> str:
        texts = [shown(sum(map(quantity, expectations))) for expectations in zip(*both, strict=True)]
        return " .. ".join(dict.fromkeys(texts))

    return [
        cell(lambda each: each.samples, short_count),
        cell(lambda each: each.tokens, short_count),
        cell(lambda each: each.seconds, short_time),
        cell(lambda each: each.bytes, short_bytes),
    ]


def short_count(count: float) -> str:
    """`950`, `1.2k`, `3.4M`, `56G`"""
    return _scaled(count, 1000, ("", "k", "M", "G", "T"))


def short_bytes(size: float) -> str:
    """`950 B`, `1.2 KiB`, `3.4 MiB`"""
    return _scaled(size, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def short_time(seconds: float) -> str:
    """`12 s`, `3.4 min`, `5.6 h`, `120 h`"""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.{1 if seconds < 100 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while round(value) >= step and power + 1 < len(units):
        value, power = value / step, power + 1
    return f"{value:.{1 if power and value < 100 else 0}f}{units[power]}"


def form_line(teacher: TeacherPlan, student_form: AnswerForm, answer: str) -> str:
    """Returns how the teacher's answers are read, and how an ending is rewritten for the student."""
    form = teacher.answer_form
    ending = f"... {OPENING[form]}{answer}{CLOSING[form]}"
    reasoning, rest = to_form(ending, find_answer(ending, form=form), student_form)
    thought = "; its prompt opens <think>, and nothing before </think> is an answer"
    return (
        f"{teacher.name} answers in the form {form}{thought if teacher.opens_think else ''}\n"
        f"the student reads {ending}  as  {reasoning}{answer}{CLOSING[student_form]}{rest}"
    )


def refilter_table(reports: Sequence[RefilterReport]) -> Table:
    """Returns the filtered traces per teacher, before and now."""
    table = plain_table("verified traces that filters reject")
    table.add_column("teacher", no_wrap=True)
    for name in ("traces", "verified", "before", "now"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        counts = (report.traces, report.verified, report.filtered_before, report.filtered_now)
        table.add_row(report.teacher, *(f"{count:,}" for count in counts))
    return table


def problems_line(summary: ProblemsSummary) -> str:
    """Returns the counts of the problem file's rows."""
    repeats = f", {summary.duplicates:,} repeated" if summary.duplicates else ""
    left_out = (
        f", {len(summary.unparseable):,} with a gold answer that cannot be parsed"
        if summary.unparseable
        else ""
    )
    part = f" (shard {summary.shard})" if summary.shard else ""
    return f"{summary.path}: {summary.rows:,} rows{repeats}{left_out}; {summary.used:,} problems used{part}"
