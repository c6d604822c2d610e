"""What `ampo precompute teachers` draws: reports in, rich tables out."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from precompute.outcome import PrecomputePlan, PrecomputeReport, ProblemsSummary
from store.tables import coverage_table, plain_table


def report_tables(report: PrecomputeReport) -> Group:
    """Per teacher what it cost and what came of it; then coverage."""
    table = plain_table(f"traces in {report.store}")
    table.add_column("teacher", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for name in ("problems", "samples", "verified", "tokens", "tokens/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for teacher in report.teachers:
        table.add_row(
            teacher.name,
            teacher.engine,
            f"{teacher.problems:,}",
            f"{teacher.samples:,}",
            f"{teacher.verified_share:.1%}",
            f"{teacher.mean_tokens:.1f}",
            f"{teacher.new_tokens / teacher.seconds:,.0f}" if teacher.new_tokens else "-",
            f"{teacher.seconds:.1f} s",
        )
    return Group(
        Text(problems_line(report.problems)), table, coverage_table(dict(enumerate(report.coverage)))
    )


def plan_tables(plan: PrecomputePlan) -> Group:
    """What is there, what is left, and the first prompt as each teacher will see it."""
    table = plain_table(f"plan for {plan.store}")
    table.add_column("teacher", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for name in ("there", "verified", "left", "tokens at most", "longest prompt", "weights"):
        table.add_column(name, justify="right")
    prompts: list[RenderableType] = []
    for teacher in plan.teachers:
        size = "-" if teacher.weight_bytes is None else f"{teacher.weight_bytes / 2**20:,.1f} MiB"
        table.add_row(
            teacher.name,
            teacher.engine,
            f"{teacher.samples_there:,}",
            f"{teacher.verified_there:,}",
            f"{teacher.samples_left:,}",
            f"{teacher.most_tokens:,}",
            f"{teacher.longest_prompt:,}",
            size,
        )
        prompts += [Text(f"first prompt of {teacher.name}:"), Text(teacher.first_prompt, style="cyan")]
    state = "" if plan.store_exists else " (would be made)"
    return Group(Text(problems_line(plan.problems) + f"; store {plan.store}{state}"), table, *prompts)


def problems_line(summary: ProblemsSummary) -> str:
    """What became of the problem file's rows."""
    repeats = f", {summary.duplicates:,} repeated" if summary.duplicates else ""
    left_out = (
        f", {len(summary.unparseable):,} with a gold answer that cannot be parsed"
        if summary.unparseable
        else ""
    )
    return f"{summary.path}: {summary.rows:,} rows{repeats}{left_out}; {summary.used:,} problems used"
