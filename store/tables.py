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
from store.report import StoreReport


def plain_table(title: str | None = None) -> Table:
    """A table that fits 80 columns where it can: no frame, two blanks between columns."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def summary_tables(report: StoreReport) -> Group:
    """Teachers x verdicts, coverage, totals. `covered`: problems with a usable trace; `filtered`: verified
    traces that a filter holds back; `tokens`: mean."""
    return Group(_teachers(report), coverage_table(report.coverage), Text(_totals(report)))


def _teachers(report: StoreReport) -> Table:
    seen = [verdict for verdict in VERDICTS if any(t.verdicts.get(verdict) for t in report.teachers)]
    held_back = ("filtered",) if report.filtered else ()
    table = plain_table(f"teachers in {report.path}")
    table.add_column("teacher", no_wrap=True)
    for name in ("covered", "traces", "verified", *held_back, *seen, "tokens"):
        table.add_column(name, justify="right")
    for teacher in report.teachers:
        table.add_row(
            teacher.teacher,
            f"{teacher.covered:,}",
            f"{teacher.traces:,}",
            f"{teacher.verified_share:.1%}",
            *(f"{getattr(teacher, name):,}" for name in held_back),
            *(f"{teacher.verdicts.get(verdict, 0):,}" for verdict in seen),
            f"{teacher.mean_tokens:.1f}",
        )
    return table


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
    return (
        f"{report.problems:,} problems, {report.traces:,} traces ({report.verified:,} verified{filtered}), "
        f"{report.tokens:,} tokens, {report.parts} parts, {report.bytes / 2**20:.1f} MiB{damaged}; "
        f"judged by {report.manifest.verifier} {report.manifest.verifier_version}"
    )


def problems_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Hardest first."""
    table = plain_table()
    table.add_column("problem_id", no_wrap=True)
    for name in ("question", "answer", "source"):
        table.add_column(name, overflow="fold")
    table.add_column("verified", justify="right")
    table.add_column("teachers that solved it")
    for row in rows:
        table.add_row(
            row["problem_id"],
            escape(_clip(row["question"], 160)),
            escape(_clip(row["answer"], 40)),
            escape(row["source"]),
            f"{row['verified']}/{row['traces']}",
            ", ".join(row["teachers"]) or "[red]none[/]",
        )
    return table


def traces_table(rows: Sequence[Mapping[str, Any]], *, full: bool) -> Table:
    """Traces side by side; `full` shows their whole text."""
    table = Table(show_lines=full)
    table.add_column("problem_id", no_wrap=True)
    for name in ("teacher", "sample", "verdict", "answer", "tokens", "text"):
        table.add_column(name, overflow="fold", justify="right" if name in ("sample", "tokens") else "left")
    for row in rows:
        colour = "green" if row["is_correct"] else "red"
        table.add_row(
            row["problem_id"],
            row["teacher"],
            str(row["sample_index"]),
            f"[{colour}]{row['verdict']}[/]{_held_back(row)}",
            escape(_clip(row["answer"] or "-", 40)),
            str(row["n_tokens"]),
            escape(row["text"] if full else _clip(row["text"], 200)),
        )
    return table


def _held_back(row: Mapping[str, Any]) -> str:
    return f"\n[yellow]filtered: {escape(row['filtered'])}[/]" if row["filtered"] else ""


def answer_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """The rows of a query; long cells are cut."""
    table = plain_table()
    for name in columns:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*("[dim]null[/]" if cell is None else escape(_clip(str(cell), 80)) for cell in row))
    return table


def _clip(text: str, length: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
