"""What `ampo precompute teachers` draws: reports in, rich tables out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from precompute.config import AnswerForm
from precompute.outcome import PrecomputePlan, PrecomputeReport, ProblemsSummary, TeacherPlan
from precompute.probe import Expectation
from precompute.solution import closing, find_answer, opening, to_form
from store.tables import coverage_table, plain_table


def report_tables(report: PrecomputeReport) -> Group:
    """Per teacher what it cost and what came of it; then coverage."""
    table = plain_table(f"traces in {report.store}")
    table.add_column("teacher", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for name in ("problems", "samples", "verified", "filtered", "tokens", "tokens/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for teacher in report.teachers:
        table.add_row(
            teacher.name,
            teacher.engine,
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
    """What is there, what is left, what it is expected to cost, and for each teacher the first prompt and how
    its answers are read and rewritten for the student."""
    state = "" if plan.store_exists else " (would be made)"
    parts: list[RenderableType] = [
        Text(problems_line(plan.problems) + f"; store {plan.store}{state}"),
        _plan_table(plan),
    ]
    if any(teacher.probe for teacher in plan.teachers):
        parts.append(_probe_table(plan))
    for teacher in plan.teachers:
        parts += [Text(f"first prompt of {teacher.name}:"), Text(teacher.first_prompt, style="cyan")]
        parts.append(Text(form_line(teacher, student_form, plan.first_problem.answer)))
    return Group(*parts)


def _plan_table(plan: PrecomputePlan) -> Table:
    table = plain_table(f"plan for {plan.store}")
    table.add_column("teacher", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    columns = ("problems x samples", "there", "usable", "left", "tokens at most", "longest prompt", "weights")
    for name in columns:
        table.add_column(name, justify="right")
    for teacher in plan.teachers:
        size = "-" if teacher.weight_bytes is None else f"{teacher.weight_bytes / 2**20:,.1f} MiB"
        table.add_row(
            teacher.name,
            teacher.engine,
            f"{plan.problems.used:,} x {teacher.sample_budget}",
            f"{teacher.samples_there:,}",
            f"{teacher.usable_there:,}",
            f"{teacher.samples_left:,}",
            f"{teacher.most_tokens:,}",
            f"{teacher.longest_prompt:,}",
            size,
        )
    return table


def _probe_table(plan: PrecomputePlan) -> Table:
    """What the probes measured (left) and what follows for what is left (right), and the sum."""
    table = plain_table("expected from a probe")
    table.add_column("teacher", no_wrap=True)
    for name in ("probed", "usable", "tokens/sample", "tokens/s", "samples", "tokens", "hours", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    expected = []
    for teacher in plan.teachers:
        probe = teacher.probe
        if probe is None or teacher.least is None or teacher.most is None:
            table.add_row(teacher.name, "nothing is left")
            continue
        expected.append((teacher.least, teacher.most))
        table.add_row(
            teacher.name,
            f"{probe.samples:,}",
            f"{probe.usable_share:.1%}",
            f"{probe.mean_tokens:,.1f}",
            f"{probe.tokens_per_second:,.0f}",
            *_expectation_cells([teacher.least], [teacher.most]),
        )
    table.add_section()
    table.add_row("all", "", "", "", "", *_expectation_cells(*map(list, zip(*expected, strict=True))))
    return table


def _expectation_cells(least: Sequence[Expectation], most: Sequence[Expectation]) -> list[str]:
    """Sums over teachers: samples, tokens, hours, disk; `a..b` where least and most differ."""

    def cell(low: float, high: float, form: str) -> str:
        texts = format(low, form), format(high, form)
        return texts[0] if texts[0] == texts[1] else "..".join(texts)

    return [
        cell(sum(each.samples for each in least), sum(each.samples for each in most), ",.0f"),
        cell(sum(each.tokens for each in least), sum(each.tokens for each in most), ",.0f"),
        cell(sum(each.seconds for each in least) / 3600, sum(each.seconds for each in most) / 3600, ",.2f"),
        cell(sum(each.bytes for each in least) / 2**20, sum(each.bytes for each in most) / 2**20, ",.1f")
        + " MiB",
    ]


def form_line(teacher: TeacherPlan, student_form: AnswerForm, answer: str) -> str:
    """How the teacher's answers are read, and how an ending in that form is written for the student."""
    form = teacher.answer_form
    ending = f"... {opening(form)}{answer}{closing(form)}"
    reasoning, rest = to_form(ending, find_answer(ending, form=form), student_form)
    thinking = ", the prompt opens <think>" if teacher.opens_think else ""
    return (
        f"answers of {teacher.name} are read in the form {form}{thinking}; "
        f"for the student: {ending}  ->  {reasoning}{answer}{closing(student_form)}{rest}"
    )


def problems_line(summary: ProblemsSummary) -> str:
    """What became of the problem file's rows."""
    repeats = f", {summary.duplicates:,} repeated" if summary.duplicates else ""
    left_out = (
        f", {len(summary.unparseable):,} with a gold answer that cannot be parsed"
        if summary.unparseable
        else ""
    )
    return f"{summary.path}: {summary.rows:,} rows{repeats}{left_out}; {summary.used:,} problems used"
