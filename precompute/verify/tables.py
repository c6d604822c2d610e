"""Tables of `ampo verify`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from precompute.verify.verify_file import FileReport, RowVerdict
from store.terminal.tables import plain_table

SHOWN_CHARS = 80


def verify_tables(report: FileReport) -> Group:
    """Returns the counts by verdict, and the failed rows that were kept."""
    tables = [counts_table(report)]
    if report.failed:
        tables.append(failed_table(report.failed, report.rows - report.matches))
    return Group(*tables)


def counts_table(report: FileReport) -> Table:
    """Returns the verdicts that occur, with their share."""
    table = plain_table(
        f"{report.rows:,} rows of {report.file}: {report.response_column} / {report.gold_column}"
    )
    table.add_column("verdict", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for verdict, rows in report.verdicts.items():
        if rows:
            colour = "green" if verdict == "match" else "red"
            table.add_row(f"[{colour}]{verdict}[/]", f"{rows:,}", f"{rows / report.rows:.1%}")
    return table


def failed_table(rows: Sequence[RowVerdict], total: int) -> Table:
    """Returns gold and answer, row by row."""
    table = plain_table(f"the first {len(rows):,} of {total:,} rows that do not match")
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name in ("gold", "answer", "detail"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = (row.gold, "-" if row.answer is None else row.answer, row.detail)
        table.add_row(str(row.row), row.verdict, *(escape(_clip(cell)) for cell in cells))
    return table


def _clip(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARS else flat[: SHOWN_CHARS - 1] + "…"
