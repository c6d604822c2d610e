"""What `ampo inspect store` and `ampo store` draw: reports in, rich tables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from store.records import VERDICTS
from store.reports.report import StoreReport
from store.terminal.table_forms import Fitting, fitting


def plain_table(title: str | None = None) -> Table:
    """A table that fits 80 columns where it can: no frame, two blanks between columns."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def summary_tables(report: StoreReport) -> Group:
    """Teachers x verdicts, coverage, totals. `covered`: problems with a usable trace; `filtered`: verified
    traces that a filter holds back; `tokens`: mean, `-` where they were never counted."""
    lines = [_totals(report), *_uncounted(report)]
    return Group(_teachers(report), coverage_table(report.coverage), Text("\n".join(lines)))


def _teachers(report: StoreReport) -> Fitting:
    seen = [verdict for verdict in VERDICTS if any(t.verdicts.get(verdict) for t in report.teachers)]
    held_back = ("filtered",) if report.filtered else ()
    table = plain_table(f"teachers in {report.path}")
    table.add_column("teacher", no_wrap=True)
    for name in ("covered", "traces", "verified", *held_back, *seen, "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for teacher in report.teachers:
        table.add_row(
            teacher.teacher,
            f"{teacher.covered:,}",
            f"{teacher.traces:,}",
            f"{teacher.verified_share:.1%}",
            *(f"{getattr(teacher, name):,}" for name in held_back),
            *(f"{teacher.verdicts.get(verdict, 0):,}" for verdict in seen),
            "-" if teacher.mean_tokens is None else f"{teacher.mean_tokens:.1f}",
        )
    return fitting(table, ("match", *reversed(seen), "traces", "filtered"))


def coverage_table(coverage: Mapping[int, int]) -> Table:
    """How many problems have 0, 1, 2, ... teachers with a usable trace."""
    total = sum(coverage.values())
    table = plain_table("coverage: teachers with a usable trace")
    for name in ("teachers", "problems", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    for teachers, problems in sorted(coverage.items()):
        share = problems / total if total else 0.0
        table.add_row(str(teachers), f"{problems:,}", f"{share:.1%}", "█" * round(30 * share))
    return table


def _totals(report: StoreReport) -> str:
    damaged = f"; {len(report.damaged)} damaged parts left out" if report.damaged else ""
    filtered = f", {report.filtered:,} of them filtered" if report.filtered else ""
    unknown = not report.tokens and any(teacher.uncounted for teacher in report.teachers)
    tokens = "unknown" if unknown else f"{report.tokens:,}"
    return (
        f"{report.problems:,} problems, {report.traces:,} traces ({report.verified:,} verified{filtered}), "
        f"{tokens} tokens, {report.parts} parts, {report.bytes / 2**20:.1f} MiB{damaged}; "
        f"judged by {report.manifest.verifier} {report.manifest.verifier_version}"
    )


def _uncounted(report: StoreReport) -> list[str]:
    """Whose tokens are unknown, and how to have them counted."""
    names = [teacher.teacher for teacher in report.teachers if teacher.uncounted]
    if not names:
        return []
    return [
        f"tokens of {', '.join(names)}: unknown where imported without a tokenizer; to count them,\n"
        f"  ampo store forget {report.path} --teacher NAME     (each of these)\n"
        f"  ampo store import FILE {report.path} --tokenizer MODEL"
    ]


def problems_table(rows: Sequence[Mapping[str, Any]]) -> Fitting:
    """Hardest first."""
    table = plain_table()
    table.add_column("problem_id", no_wrap=True)
    for name, least in (("question", 24), ("answer", 6), ("source", 6)):
        table.add_column(name, overflow="fold", min_width=least)
    table.add_column("verified", justify="right", no_wrap=True)
    table.add_column("solved by", min_width=9)
    for row in rows:
        table.add_row(
            row["problem_id"],
            escape(_clip(row["question"], 160)),
            escape(_clip(row["answer"], 40)),
            escape(row["source"]),
            f"{row['verified']}/{row['traces']}",
            ", ".join(row["teachers"]) or "[red]none[/]",
        )
    return fitting(table, ("source",))


def traces_table(rows: Sequence[Mapping[str, Any]], *, full: bool) -> Fitting:
    """Traces side by side; `full` shows their whole text."""
    table = plain_table()
    table.add_column("problem_id", no_wrap=True)
    table.add_column("teacher", no_wrap=True)
    table.add_column("sample", justify="right", no_wrap=True)
    for name, least in (("verdict", 8), ("answer", 6)):
        table.add_column(name, overflow="fold", min_width=least)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold", min_width=32)
    for row in rows:
        colour = "green" if row["is_correct"] else "red"
        table.add_row(
            row["problem_id"],
            row["teacher"],
            str(row["sample_index"]),
            f"[{colour}]{row['verdict']}[/]{_held_back(row)}",
            escape(_clip(row["answer"] or "-", 40)),
            str(row["n_tokens"] or "-"),
            escape(row["text"] if full else _clip(row["text"], 200)),
            end_section=True,
        )
    return fitting(table, ("sample", "tokens", "problem_id"))


def _held_back(row: Mapping[str, Any]) -> str:
    return f"\n[yellow]filtered: {escape(row['filtered'])}[/]" if row["filtered"] else ""


def answer_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Fitting:
    """The rows of a query, long cells cut; where columns have no room side by side, one below the other."""
    shown = [
        ["[dim]null[/]" if cell is None else escape(_clip(str(cell), 80)) for cell in row] for row in rows
    ]
    wide, tall = plain_table(), plain_table()
    for place, name in enumerate(columns):
        longest = max(map(len, [name, *(row[place] for row in shown)]))
        wide.add_column(escape(name), overflow="fold", min_width=min(longest, 12))
    tall.add_column("column", no_wrap=True)
    tall.add_column("value", overflow="fold", min_width=12)
    for row in shown:
        wide.add_row(*row)
        for name, cell in zip(columns, row, strict=True):
            tall.add_row(escape(name), cell)
        tall.add_section()
    return Fitting(wide, tall)


def _clip(text: str, length: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
