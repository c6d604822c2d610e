"""A long command's progress: a bar where there is a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from store.terminal.shared import console_of

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_SECONDS = 5.0
"""Between two lines where there is no terminal."""
DRAW_SECONDS = 0.1


class Meter:
    """Says on stderr how far one thing is. A context manager."""

    def __init__(self, label: str) -> None:
        from store.terminal.bars import progress_bars

        self._label = label
        self._console = console_of(stderr=True)
        self._bars = progress_bars(self._console)
        self._task: TaskID | None = None
        self._said = time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Moves the bar, or prints a line when the last one is a while ago."""
        live = self._console.is_terminal
        now = time.monotonic()
        if now - self._said < (DRAW_SECONDS if live else LINE_SECONDS) and done < total:
            return
        if not live:
            if now - self._said >= LINE_SECONDS:
                self._console.print(f"{self._label}: {done:,}/{total:,}  {note}", highlight=False)
                self._said = now
            return
        self._said = now
        if self._task is None:
            self._task = self._bars.add_task(self._label, total=total, note=note)
        self._bars.update(self._task, completed=done, total=total, note=note)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
