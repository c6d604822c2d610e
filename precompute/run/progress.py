"""What a person sees while teachers work: a bar where there is a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import TaskID

from store.terminal.bars import progress_bars

LINE_SECONDS = 5.0
"""Between two lines where there is no terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherProgress:
    """How far one teacher is."""

    teacher: str
    done: int
    """Samples drawn and judged, those of earlier runs included."""
    total: int
    """Samples to be there in the end; with `until_verified` at most."""
    verified: int
    """Of the samples judged in this run."""
    filtered: int
    """Of the verified: held back by a filter."""
    judged: int
    """In this run."""
    tokens: int
    """Drawn in this run."""
    seconds: float
    """Since the model was loaded."""

    @property
    def verified_share(self) -> float:
        """Of this run's samples, in [0, 1]."""
        return self.verified / self.judged if self.judged else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over this run."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """At this run's pace; None before the first sample is judged."""
        return (self.total - self.done) * self.seconds / self.judged if self.judged else None


class Reporter(Protocol):
    """Is told what happens; from any thread."""

    def message(self, text: str) -> None:
        """Something worth a line."""
        ...

    def stage(self, label: str, done: int, total: int) -> None:
        """A preparation that takes a while is `done` of `total` along."""
        ...

    def progress(self, progress: TeacherProgress) -> None:
        """One more sample is judged."""
        ...

    def finished(self, progress: TeacherProgress) -> None:
        """A teacher has nothing left to do."""
        ...


class SilentReporter:
    """Says nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def stage(self, label: str, done: int, total: int) -> None:
        """Nothing."""

    def progress(self, progress: TeacherProgress) -> None:
        """Nothing."""

    def finished(self, progress: TeacherProgress) -> None:
        """Nothing."""


class ConsoleReporter:
    """Draws on a rich console. A context manager."""

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
        """A line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(self, label: str, done: int, total: int) -> None:
        """A bar of its own that goes when it is full; without a terminal a line when it takes long."""
        with self._lock:
            self._bar(label, done, total, "")
            if self._live and done >= total:
                self._bars.remove_task(self._tasks.pop(label))
            elif not self._live and 0 < done < total and self._is_due(label):
                self.message(f"{label}: {done}/{total}")

    def progress(self, progress: TeacherProgress) -> None:
        """Moves the teacher's bar; without a terminal a line every few seconds."""
        with self._lock:
            self._bar(progress.teacher, progress.done, progress.total, _note(progress))
            if not self._live and self._is_due(progress.teacher):
                self.message(_line(progress))

    def finished(self, progress: TeacherProgress) -> None:
        """Leaves the bar standing, or prints the last line."""
        with self._lock:
            self._bar(progress.teacher, progress.done, progress.done, _note(progress) or "nothing left to do")
            if not self._live:
                self.message(_line(progress))

    def _bar(self, label: str, done: int, total: int, note: str) -> None:
        if not self._live:
            return
        if label not in self._tasks:
            # What earlier runs did is not this run's speed.
            self._tasks[label] = self._bars.add_task(label, total=total, completed=done, note=note)
        self._bars.update(self._tasks[label], completed=done, total=total, note=note)

    def _is_due(self, label: str) -> bool:
        now = time.monotonic()
        if now - self._last_line.setdefault(label, now) < LINE_SECONDS:
            return False
        self._last_line[label] = now
        return True


def _note(progress: TeacherProgress) -> str:
    if not progress.judged:
        return ""
    filtered = f"  filtered {progress.filtered:,}" if progress.filtered else ""
    return f"verified {progress.verified_share:.0%}{filtered}  {progress.tokens_per_second:,.0f} tokens/s"


def _line(progress: TeacherProgress) -> str:
    eta = progress.eta_seconds
    rest = f"  ETA {eta:.0f} s" if eta else ""
    note = _note(progress) or "nothing left to do"
    return f"{progress.teacher}: {progress.done}/{progress.total}  {note}{rest}"
