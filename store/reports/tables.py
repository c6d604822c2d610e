"""Tables of `ampo inspect store` and `ampo store`: reports in, rich tables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from store.records import VERDICTS
from store.reports.report import StoreReport
from store.terminal.tables import clipped, plain_table
from store.upkeep.checking import QUARANTINE, CheckReport

Row = Mapping[str, Any]

COLUMN_WIDTH = 12
"""Characters of a column below which `sql_table` puts the cells of a row below each other."""


def summary_tables(report: StoreReport) -> Group:
    """Returns teachers x verdicts, coverage and totals.

    `covered`: problems with a usable trace; `filtered`: verified traces that a filter excludes; `tokens`:
    mean, `-` where they were never counted.
    """
    blocks: list[RenderableType] = [_teachers(report), coverage_table(report.coverage), Text(_totals(report))]
    if uncounted := [teacher.teacher for teacher in report.teachers if teacher.uncounted]:
        blocks.append(
            Text(
                f"tokens of {', '.join(uncounted)}: unknown where imported without a tokenizer; to count "
                "them, forget the teacher and import its traces again with --tokenizer MODEL"
            )
        )
    return Group(*blocks)


def _teachers(report: StoreReport) -> Table:
    seen = [verdict for verdict in VERDICTS if any(t.verdicts.get(verdict) for t in report.teachers)]
    filtered = ["filtered"] if report.filtered else []
    table = plain_table(f"teachers in {report.path}", text=["teacher"])
    for name in ("covered", "traces", "verified", *filtered, *seen, "tokens"):
        table.add_column(name, justify="right", overflow="fold")
    for teacher in report.teachers:
        table.add_row(
            teacher.teacher,
            f"{teacher.covered:,}",
            f"{teacher.traces:,}",
            f"{teacher.verified_share:.1%}",
            *(f"{getattr(teacher, name):,}" for name in filtered),
            *(f"{teacher.verdicts.get(verdict, 0):,}" for verdict in seen),
            "-" if teacher.mean_tokens is None else f"{teacher.mean_tokens:.1f}",
        )
    return table


def coverage_table(coverage: Mapping[int, int]) -> Table:
    """Returns the number of problems with 0, 1, 2, ... teachers that have a usable trace."""
    total = max(sum(coverage.values()), 1)
    return plain_table(
        "coverage: teachers with a usable trace",
        numbers=["teachers", "problems", "share"],
        rows=(
            (teachers, problems, f"{problems / total:.1%}") for teachers, problems in sorted(coverage.items())
        ),
    )


def _totals(report: StoreReport) -> str:
    damaged = f"; {len(report.damaged)} damaged parts left out" if report.damaged else ""
    filtered = f", {report.filtered:,} of them filtered" if report.filtered else ""
    return (
        f"{report.problems:,} problems, {report.traces:,} traces ({report.verified:,} verified{filtered}), "
        f"{report.tokens:,} tokens, {report.parts} parts, {report.bytes / 2**20:.1f} MiB{damaged}; "
        f"verified by {report.manifest.verified_by}"
    )


def problems_table(rows: Sequence[Row]) -> Table:
    """Returns a row a problem, in the order given."""
    table = plain_table()
    table.add_column("problem_id", no_wrap=True)
    for name, least in (("question", 24), ("answer", 6), ("source", 6)):
        table.add_column(name, overflow="fold", min_width=least)
    table.add_column("verified", justify="right", no_wrap=True)
    table.add_column("solved by", overflow="fold")
    for row in rows:
        table.add_row(
            row["problem_id"],
            escape(clipped(row["question"], 160)),
            escape(clipped(row["answer"], 40)),
            escape(row["source"]),
            f"{row['verified']}/{row['traces']}",
            ", ".join(row["teachers"]) or "[red]none[/]",
        )
    return table


def traces_table(rows: Sequence[Row], *, full: bool) -> Table:
    """Returns a row a trace; `full` shows whole texts."""
    table = plain_table()
    for name, least in (("problem_id", 8), ("trace", 6), ("verdict", 8), ("answer", 6)):
        table.add_column(name, overflow="fold", min_width=least)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold", min_width=32)
    for row in rows:
        filtered = f"\n[yellow]filtered: {escape(row['filtered'])}[/]" if row["filtered"] else ""
        table.add_row(
            row["problem_id"],
            _sample(row),
            _verdict(row) + filtered,
            escape(clipped(row["answer"] or "-", 40)),
            str(row["n_tokens"] or "-"),
            escape(row["text"] if full else clipped(row["text"], 200)),
            end_section=True,
        )
    return table


def why_table(rows: Sequence[Row]) -> Table:
    """Returns gold and answer of each trace, as written and as the verifier read them, and the reason.

    Args:
        rows: of `report.trace_row`, each with the `gold` answer of its problem.
    """
    table = plain_table(
        text=["problem_id", "trace", "verdict", "gold", "read as", "answer", "read as", "why"]
    )
    for row in rows:
        cells = [row[name] for name in ("gold", "parsed_gold", "answer", "parsed_answer")]
        table.add_row(
            row["problem_id"],
            _sample(row),
            _verdict(row),
            *("[dim]-[/]" if cell is None else escape(cell[:200]) for cell in cells),
            escape(_reason(row)),
            end_section=True,
        )
    return table


def _sample(row: Row) -> str:
    return f"{escape(row['teacher'])}/{row['sample_index']}"


def _verdict(row: Row) -> str:
    return f"[{'green' if row['is_correct'] else 'red'}]{row['verdict']}[/]"


def _reason(row: Row) -> str:
    truncated = row["verdict"] == "match" and not row["is_correct"]
    reasons = [
        row["verdict_detail"],
        "not correct because the response was truncated" if truncated else "",
        f"filtered: {row['filtered']}" if row["filtered"] else "",
    ]
    return "; ".join(filter(None, reasons))


def sql_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, width: int) -> Table:
    """Returns the result of a query, long cells clipped; a table of many columns has one line per cell."""
    shown = [
        ["[dim]null[/]" if cell is None else escape(clipped(str(cell), 80)) for cell in row] for row in rows
    ]
    if len(columns) * COLUMN_WIDTH <= width:
        return plain_table(text=[escape(name) for name in columns], rows=shown)
    table = plain_table(text=["column", "value"])
    for row in shown:
        for name, cell in zip(columns, row, strict=True):
            table.add_row(escape(name), cell)
        table.add_section()
    return table


def check_table(report: CheckReport, *, repaired: bool) -> Group:
    """Returns the findings, the traces lost by teacher, and the commands that restore them."""
    lines = [f"{report.path}: {report.parts:,} parts, {report.bytes / 2**20:,.1f} MiB read"]
    if report.entered:
        lines.append(f"entered in the manifest: {', '.join(report.entered)}")
    if not report.findings:
        return Group(Text("\n".join(lines)), Text("every part is whole", style="green"))
    table = plain_table(
        text=["part", "fault", "detail"],
        numbers=["traces lost"],
        rows=(
            (escape(each.part), f"[red]{each.fault}[/]", escape(each.detail), sum(each.traces.values()))
            for each in report.findings
        ),
    )
    after = [
        f"lost of {teacher}: {count:,} traces ({report.lost_verified.get(teacher, 0):,} verified)"
        for teacher, count in report.lost.items()
    ] or ["no trace of this store is lost"]
    after.append(
        f"moved to {report.path}/{QUARANTINE}: {len(report.moved)} files"
        if repaired
        else f"`ampo store check {report.path} --repair` moves these files to {QUARANTINE}/"
    )
    if report.lost:
        teachers = " ".join(f"--teacher {teacher}" for teacher in report.lost)
        after.append(
            f"`ampo precompute teachers --config ... {teachers}` samples exactly the lost traces again; for "
            "imported traces, `ampo store import` of the same file"
        )
    return Group(Text("\n".join(lines)), table, Text("\n".join(after)))
