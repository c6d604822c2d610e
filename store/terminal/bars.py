"""The one kind of progress bar that every command draws."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bars(console: Console) -> Progress:
    """Bars with a description, a count, a note (a task field that must be given) and an ETA.

    Where there is no terminal nothing is drawn; the caller prints lines instead. A narrow one shows the time
    that is left and not the time that is gone.
    """
    elapsed = [TimeElapsedColumn()] if console.width >= 100 else []
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        *elapsed,
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
