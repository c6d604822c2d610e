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
    TimeRemainingColumn,
)

from store.terminal.console import console_of

LINE_SECONDS = 5.0
"""Between two lines without a terminal."""


def progress_bars(console: Console) -> Progress:
    """Returns bars with a description, a count, a note (a task field that must be given) and an ETA.

    Without a terminal they draw nothing and the caller prints lines instead.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class Bars:
    """Progress of several tasks on a console. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = progress_bars(console)
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}

    def show(self, label: str, done: int, total: int, note: str = "", *, last: bool = False) -> None:
        """Moves the label's bar; without a terminal prints a line when its last one is LINE_SECONDS old, and
        the last one."""
        now = time.monotonic()
        if label not in self._tasks:
            # Work of earlier runs does not count towards the speed.
            self._tasks[label] = self._bars.add_task(label, total=total, completed=done, note=note)
            self._printed[label] = now
        task = self._tasks[label]
        self._bars.update(task, completed=done, total=total, note=note)
        if not self._console.is_terminal and (last or now - self._printed[label] >= LINE_SECONDS):
            self._printed[label] = now
            rest = self._bars.tasks[task].time_remaining
            self.message(f"{label}: {done:,}/{total:,}  {note}" + (f"  ETA {rest:.0f} s" if rest else ""))

    def message(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


class Meter(Bars):
    """Progress of one task on stderr, called with (done, total)."""

    def __init__(self, label: str) -> None:
        super().__init__(console_of(stderr=True))
        self._label = label

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Moves the bar."""
        self.show(self._label, done, total, note)
