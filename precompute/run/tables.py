"""Tables of `ampo precompute teachers` and `ampo store refilter`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from precompute.run.plan import PrecomputePlan, PrecomputeReport, ProblemsSummary, TeacherOutcome, TeacherPlan
from precompute.run.refilter import RefilterReport
from precompute.run.reverify import ReverifyReport
from precompute.verify.final_answer import CLOSING, LINES, OPENING, find_answer, to_form
from store.records import AnswerForm, Problem, Trace
from store.reports.tables import coverage_table
from store.terminal.tables import plain_table


def report_tables(report: PrecomputeReport) -> Group:
    """Returns cost and result per teacher, and coverage."""
    table = plain_table(
        f"traces in {report.store}",
        text=["teacher"],
        numbers=["problems", "samples", "verified", "filtered", "tokens", "tokens/s", "time"],
        rows=map(_outcome, report.teachers),
    )
    hints = [
        Text(unverified_line(report.store, outcome.stored.traces, *outcome.unverified), style="yellow")
        for outcome in report.teachers
        if outcome.unverified
    ]
    return Group(Text(problems_line(report.problems)), table, coverage_table(report.coverage), *hints)


def unverified_line(store: str, samples: int, trace: Trace, problem: Problem) -> str:
    """Returns a line that shows why none of a teacher's samples is verified, by the end of one of them."""
    reason = f" ({trace.verdict_detail})" if trace.verdict_detail else ""
    cut = ", cut at max_tokens," if trace.finish_reason == "length" else ""
    return (
        f"{trace.teacher}: none of its {samples:,} samples is verified. One, of {trace.problem_id}{cut}"
        f" ends: {trace.text[-160:]!r}; answer {trace.answer!r}, gold {problem.answer!r}, verdict "
        f"{trace.verdict}{reason}. More: ampo inspect store traces {os.path.relpath(store)} "
        f"--teacher {trace.teacher} --why"
    )


def _outcome(teacher: TeacherOutcome) -> tuple[str | int, ...]:
    stored = teacher.stored
    return (
        stored.teacher,
        stored.problems,
        stored.traces,
        f"{stored.verified_share:.1%}",
        stored.filtered,
        f"{stored.mean_tokens or 0:.1f}",
        round(teacher.new_tokens / teacher.seconds) if teacher.new_tokens else "-",
        f"{teacher.seconds:.1f} s",
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
        parts.append(_probe_table(plan))
    for teacher in plan.teachers:
        parts += [Text(f"first prompt of {teacher.name}:"), Text(teacher.first_prompt, style="cyan")]
        parts.append(Text(form_line(teacher, student_form, plan.first_problem.answer)))
    return Group(*parts)


def _plan_table(plan: PrecomputePlan) -> Table:
    return plain_table(
        f"plan for {plan.store}",
        text=["teacher", "engine"],
        numbers=["samples", "stored", "usable", "left", "tokens\nat most", "longest\nprompt"],
        rows=(
            (
                teacher.name,
                teacher.engine,
                f"{plan.problems.used:,} x {teacher.sample_budget}",
                teacher.samples_stored,
                teacher.usable_stored,
                teacher.samples_left,
                teacher.most_tokens,
                teacher.longest_prompt,
            )
            for teacher in plan.teachers
        ),
    )


def _probe_table(plan: PrecomputePlan) -> Table:
    """Returns the measurements, and the expected cost of the remaining samples."""
    table = plain_table(
        "measured on a probe, and expected for the rest",
        text=["teacher"],
        numbers=["verified", "usable", "tokens\neach", "tokens/s", "samples", "tokens", "time", "disk"],
    )
    probes = [(teacher.name, teacher.probe) for teacher in plan.teachers if teacher.probe]
    for name, probe in probes:
        table.add_row(
            name,
            f"{probe.verified / probe.samples:.0%}",
            f"{probe.usable / probe.samples:.0%}",
            f"{probe.tokens / probe.samples:,.0f}",
            f"{probe.tokens / probe.seconds:,.0f}",
            *_cost(probe.left, probe.tokens_left, probe.seconds_left, probe.bytes_left),
        )
    columns = [(p.left, p.tokens_left, p.seconds_left, p.bytes_left) for _, p in probes]
    table.add_section()
    table.add_row("all", "", "", "", "", *_cost(*map(sum, zip(*columns, strict=True))))
    return table


def _cost(samples: float, tokens: float, seconds: float, size: float) -> list[str]:
    time = timedelta(seconds=round(seconds))
    return [f"{samples:,.0f}", f"{tokens:,.0f}", str(time), decimal(round(size))]


def form_line(teacher: TeacherPlan, student_form: AnswerForm, answer: str) -> str:
    """Returns how the teacher's answers are read, and how an ending is rewritten for the student."""
    form = teacher.answer_form
    before = "...\n" if form in LINES else "... "
    ending = f"{before}{OPENING[form]}{answer}{CLOSING[form]}"
    found = find_answer(ending, form=form)
    if found.answer is None or ("letter" in (form, student_form) and len(answer) != 1):
        return form_line(teacher, student_form, "A")  # an answer that fits every form
    reasoning, rest = to_form(ending, found, student_form)
    thought = "; its prompt opens <think>, and nothing before </think> is an answer"
    shown, rewritten = (
        text.replace("\n", "\\n") for text in (ending, f"{reasoning}{answer}{CLOSING[student_form]}{rest}")
    )
    return (
        f"{teacher.name} answers in the form {form}{thought if teacher.opens_think else ''}\n"
        f"the student reads {shown}  as  {rewritten}"
    )


def refilter_table(reports: Sequence[RefilterReport]) -> Table:
    """Returns the filtered traces per teacher, before and now."""
    return plain_table(
        "verified traces that filters reject",
        text=["teacher"],
        numbers=["traces", "verified", "before", "now"],
        rows=(
            (each.teacher, each.traces, each.verified, each.filtered_before, each.filtered_now)
            for each in reports
        ),
    )


def reverify_table(reports: Sequence[ReverifyReport]) -> Table:
    """Returns the verified traces per teacher, before and now."""
    table = plain_table(
        "traces verified again", text=["teacher"], numbers=["traces", "verified before", "now", "changed"]
    )
    for report in reports:
        counts = (report.traces, report.verified_before, report.verified_now, report.changed)
        table.add_row(report.teacher, *(f"{count:,}" for count in counts))
    return table


def problems_line(summary: ProblemsSummary) -> str:
    """Returns the counts of the problem file's rows."""
    repeats = f", {summary.duplicates:,} repeated" if summary.duplicates else ""
    left_out = f", {summary.left_out:,} left out" if summary.left_out else ""
    part = f" (shard {summary.shard})" if summary.shard else ""
    return f"{summary.path}: {summary.rows:,} rows{repeats}{left_out}; {summary.used:,} problems used{part}"
