"""Progress of long commands: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from store.terminal.console import console_of

LINE_SECONDS = 5.0
"""Between two lines without a terminal."""


def progress_bars(console: Console) -> Progress:
    """Returns bars with a description, a count, a note (a task field that must be given) and an ETA.

    Without a terminal they draw nothing and the caller prints lines instead. A narrow terminal shows only the
    remaining time, a wide one also the elapsed time.
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


class Meter:
    """Progress of one task on stderr. A context manager, called with (done, total)."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._console = console_of(stderr=True)
        self._bars = progress_bars(self._console)
        self._task: TaskID | None = None
        self._printed = time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Moves the bar; without a terminal prints a line when the last one is LINE_SECONDS old."""
        if self._console.is_terminal:
            if self._task is None:
                self._task = self._bars.add_task(self._label, total=total, note=note)
            self._bars.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._console.print(f"{self._label}: {done:,}/{total:,}  {note}", highlight=False)
            self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
