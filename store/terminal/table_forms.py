"""Tables for any width: the whole of one where there is room, a narrower form where there is less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

ANY_WIDTH = 100_000


class Fitting:
    """Draws the first of several forms of one table that there is room for, else the last."""

    def __init__(self, *forms: Table) -> None:
        self.forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        roomy = (form for form in self.forms if width_of(form, console) <= options.max_width)
        drawn = copy(next(roomy, self.forms[-1]))
        told, drawn.caption = drawn.caption, None  # which would be as narrow as the table
        yield drawn
        if told:
            yield Text(str(told), style="dim")


def fitting(table: Table, least_first: Sequence[str]) -> Fitting:
    """The table; where it is too wide, without the columns that say least, and with their names below it.

    Args:
        least_first: heads of columns that may go; those that the table lacks do not matter.
    """
    return Fitting(table, *_narrower(table, least_first))


def width_of(table: Table, console: Console) -> int:
    """Characters that it takes when nothing is cut; a column with a `min_width` may fold to that."""
    columns = [replace(column, width=column.min_width) for column in table.columns]
    return Measurement.get(console, console.options.update(max_width=ANY_WIDTH), _of(table, columns)).maximum


def _narrower(table: Table, least_first: Sequence[str]) -> Iterator[Table]:
    heads = [column.header for column in table.columns]
    may_go = [name for name in least_first if name in heads]
    for count in range(1, len(may_go) + 1):
        gone = may_go[:count]
        narrow = _of(table, [column for column in table.columns if column.header not in gone])
        narrow.caption = f"a wider terminal also shows: {', '.join(gone)}".replace("\n", " ")
        yield narrow


def _of(table: Table, columns: Sequence[Column]) -> Table:
    """The same rows, of these columns."""
    narrow = copy(table)
    narrow.columns = [replace(column, _index=index) for index, column in enumerate(columns)]
    return narrow
