"""Tables of all commands: text folds where the terminal is narrow, numbers stay whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table


def plain_table(
    title: str | None = None,
    *,
    text: Sequence[str] = (),
    numbers: Sequence[str] = (),
    rows: Iterable[Iterable[str | int]] = (),
) -> Table:
    """Returns a table without frame, with columns of text, then columns of numbers; a caller may add more."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in text:
        table.add_column(name, overflow="fold", min_width=6)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row))
    return table


def clipped(text: str, length: int) -> str:
    """Returns the text in one line of at most `length` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
