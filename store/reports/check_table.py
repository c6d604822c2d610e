"""What `ampo store check` draws."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from store.reports.tables import plain_table
from store.upkeep.checking import QUARANTINE, CheckReport


def check_table(report: CheckReport, *, repaired: bool) -> Group:
    """The findings, what is lost by teacher, and what to do."""
    head = Text(f"{report.path}: {report.parts:,} parts, {report.bytes / 2**20:,.1f} MiB read")
    rows: list[RenderableType] = [head]
    if report.entered:
        rows.append(Text(f"entered in the manifest: {', '.join(report.entered)}"))
    if not report.findings:
        return Group(*rows, Text("every part is whole", style="green"))
    table = plain_table()
    for name in ("part", "fault", "what", "traces lost"):
        table.add_column(name, overflow="fold")
    for finding in report.findings:
        lost = ", ".join(f"{teacher} {count:,}" for teacher, count in finding.traces.items())
        table.add_row(escape(finding.part), f"[red]{finding.fault}[/]", escape(finding.detail), lost or "-")
    return Group(*rows, table, *_what_to_do(report, repaired))


def _what_to_do(report: CheckReport, repaired: bool) -> list[Text]:
    lost = [
        f"{teacher}: {count:,} traces ({report.lost_verified.get(teacher, 0):,} verified)"
        for teacher, count in report.lost.items()
    ]
    lines = [Text("lost: " + "; ".join(lost))] if lost else [Text("nothing of this store's is lost")]
    if not repaired:
        lines.append(Text(f"`ampo store check {report.path} --repair` sets these files aside"))
    elif report.moved:
        lines.append(Text(f"set aside in {report.path}/{QUARANTINE}"))
    return lines + _regenerate(report)


def _regenerate(report: CheckReport) -> list[Text]:
    teachers = " ".join(f"--teacher {teacher}" for teacher in report.lost)
    if not teachers:
        return []
    return [
        Text(
            f"`ampo precompute teachers --config ... {teachers}` draws exactly the lost samples again; for "
            "imported traces, `ampo store import` of the same file"
        )
    ]
