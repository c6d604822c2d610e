"""Progress of teachers on a console: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from store.terminal.progress import Bars


@dataclass(slots=True, kw_only=True)
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
    def note(self) -> str:
        """Verified share of the new samples, filtered ones and speed, for the end of a line."""
        if not self.new:
            return "nothing left to do" if self.done >= self.total else ""
        filtered = f"  filtered {self.filtered:,}" if self.filtered else ""
        speed = self.tokens / max(self.seconds, 1e-9)
        return f"verified {self.verified / self.new:.0%}{filtered}  {speed:,.0f} tokens/s"


class Reporter:
    """Receives what happens; this one drops it."""

    def message(self, text: str) -> None:
        """Receives a line for the user, from any thread."""

    def show(self, label: str, done: int, total: int, note: str = "", *, last: bool = False) -> None:
        """Receives the progress of whatever takes a while."""

    def progress(self, progress: TeacherProgress, *, last: bool = False) -> None:
        """Receives a teacher's progress after every sample, and at the end with `last`."""
        self.show(progress.teacher, progress.done, progress.total, progress.note, last=last)


class ConsoleReporter(Bars, Reporter):
    """Prints on a rich console. A context manager."""
