"""Counts of an import, and their table."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Group
from rich.text import Text

from store.records import VERDICTS
from store.terminal.tables import plain_table


@dataclass(slots=True)
class ImportCounts:
    """Progress of an import."""

    total: int
    """Traces in the files."""
    done: int = 0
    """Traces read so far."""
    new: int = 0
    """New traces with a verdict."""
    verified: int = 0

    @property
    def note(self) -> str:
        """The verified share of the new traces."""
        return f"verified {self.verified / self.new:.0%}" if self.new else ""


@dataclass(slots=True)
class TeacherImport:
    """Counts of one teacher's traces."""

    teacher: str
    source: str
    """The files' name for it."""
    found: int = 0
    """Traces in the files."""
    empty: int = 0
    """Without a text; left out."""
    repeated: int = 0
    """The pair's text once more; left out."""
    existing: int = 0
    """In the store before."""
    new: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    """Number of new traces by verdict; a verdict that does not occur is missing."""
    filtered: int = 0
    """Number of new verified traces that a filter keeps from the student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """Result of an import."""

    store: str
    files: tuple[str, ...]
    problems: int
    """Number of different problems in the files."""
    teachers: tuple[TeacherImport, ...]
    seconds: float


def import_tables(report: ImportReport) -> Group:
    """Returns a row per teacher, with the verdicts on the new traces."""
    seen = [verdict for verdict in VERDICTS if any(verdict in t.verdicts for t in report.teachers)]
    left_out = [name for name in ("empty", "repeated") if any(getattr(t, name) for t in report.teachers)]
    table = plain_table(f"imported into {report.store}")
    held = ["filtered"] if any(t.filtered for t in report.teachers) else []
    table.add_column("teacher", no_wrap=True)
    for name in ("in the files", *left_out, "existing", "new", *seen, *held):
        table.add_column(name, justify="right")
    for teacher in report.teachers:
        table.add_row(
            teacher.teacher,
            *(f"{getattr(teacher, name):,}" for name in ("found", *left_out, "existing", "new")),
            *(f"{teacher.verdicts.get(verdict, 0):,}" for verdict in seen),
            *(f"{getattr(teacher, name):,}" for name in held),
        )
    return Group(table, Text(_totals(report)))


def _totals(report: ImportReport) -> str:
    new = sum(teacher.new for teacher in report.teachers)
    verified = sum(teacher.verdicts.get("match", 0) for teacher in report.teachers)
    share = f", {verified / new:.1%} of them verified" if new else ""
    files = report.files[0] if len(report.files) == 1 else f"{len(report.files)} files"
    return f"{files}: {report.problems:,} problems; {new:,} new traces{share}; {report.seconds:.1f} s"
