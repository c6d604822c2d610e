"""Progress of teachers on a console: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import TaskID

from store.terminal.progress import progress_bars

LINE_SECONDS = 5.0
"""Between two lines where there is no terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherProgress:
    """Progress of one teacher."""

    teacher: str
    done: int
    """Samples in the store or verified, those of earlier runs included."""
    total: int
    """Samples at the end; with `until_verified` an upper bound."""
    new: int = 0
    """Samples of this run."""
    verified: int = 0
    """Verified ones among the new samples."""
    filtered: int = 0
    """Verified ones that a filter rejects."""
    tokens: int = 0
    """Tokens of the new samples."""
    seconds: float = 0.0
    """Since the model was loaded."""

    @property
    def verified_share(self) -> float:
        """Share of the new samples that are verified, in [0, 1]."""
        return self.verified / self.new if self.new else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this run."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end at this run's pace; None before its first sample."""
        return (self.total - self.done) * self.seconds / self.new if self.new else None


class Reporter:
    """Receives what happens, from any thread; this one drops it."""

    def message(self, text: str) -> None:
        """Receives a line for the user."""

    def stage(self, label: str, done: int, total: int) -> None:
        """Receives how far a preparation is that takes a while."""

    def progress(self, progress: TeacherProgress) -> None:
        """Receives a teacher's progress after every sample."""

    def finished(self, progress: TeacherProgress) -> None:
        """Receives the last progress of a teacher."""


class ConsoleReporter(Reporter):
    """Prints on a rich console. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._bars = progress_bars(console)
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def message(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(self, label: str, done: int, total: int) -> None:
        """Shows a bar until it is full; without a terminal prints a line when the stage takes long."""
        with self._lock:
            self._bar(label, done, total, "")
            if self._live and done >= total:
                self._bars.remove_task(self._tasks.pop(label))
            elif not self._live and 0 < done < total and self._is_due(label):
                self.message(f"{label}: {done}/{total}")

    def progress(self, progress: TeacherProgress) -> None:
        """Moves the teacher's bar; without a terminal prints a line every few seconds."""
        with self._lock:
            self._bar(progress.teacher, progress.done, progress.total, _note(progress))
            if not self._live and self._is_due(progress.teacher):
                self.message(_line(progress))

    def finished(self, progress: TeacherProgress) -> None:
        """Fills the teacher's bar, or prints the last line."""
        with self._lock:
            self._bar(progress.teacher, progress.done, progress.done, _note(progress) or "nothing left to do")
            if not self._live:
                self.message(_line(progress))

    def _bar(self, label: str, done: int, total: int, note: str) -> None:
        if not self._live:
            return
        if label not in self._tasks:
            # Samples of earlier runs do not count towards the speed.
            self._tasks[label] = self._bars.add_task(label, total=total, completed=done, note=note)
        self._bars.update(self._tasks[label], completed=done, total=total, note=note)

    def _is_due(self, label: str) -> bool:
        now = time.monotonic()
        if now - self._last_line.setdefault(label, now) < LINE_SECONDS:
            return False
        self._last_line[label] = now
        return True


def _note(progress: TeacherProgress) -> str:
    if not progress.new:
        return ""
    filtered = f"  filtered {progress.filtered:,}" if progress.filtered else ""
    return f"verified {progress.verified_share:.0%}{filtered}  {progress.tokens_per_second:,.0f} tokens/s"


def _line(progress: TeacherProgress) -> str:
    eta = progress.eta_seconds
    rest = f"  ETA {eta:.0f} s" if eta else ""
    note = _note(progress) or "nothing left to do"
    return f"{progress.teacher}: {progress.done}/{progress.total}  {note}{rest}"
