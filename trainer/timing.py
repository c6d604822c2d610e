"""A timer of a step's phases: each second counts in exactly one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Timer = Callable[[str], AbstractContextManager[Any]]
"""Context in which the time is the named phase's: a StepTimer, or `nullcontext` where nothing is measured."""

PHASES = ("sample", "verify", "query", "score", "place", "update", "sync")
"""In the order of a step. `verify` is the wait for verdicts after sampling, most of which arrive meanwhile;
`sync` is the sampler's time to free memory and to get the new weights."""


class StepTimer:
    """Seconds and peak memory by phase. A phase inside another stops the outer one's clock until it ends."""

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, peak_memory: Callable[[], int] = lambda: 0
    ) -> None:
        """`peak_memory`: waits for the device's work and returns the most bytes held since the last call."""
        self._clock, self._peak_memory = clock, peak_memory
        self._peak_memory()
        self._open = ["other"]
        self._began = self._since = clock()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.peaks: dict[str, int] = {}
        """Bytes by phase; `other` outside of phases."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the block's time as the phase's; a phase may be entered often."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Adds the time since the last call to the innermost open phase."""
        phase = self._open[-1]
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._peak_memory())
        before, self._since = self._since, self._clock()
        if phase != "other":
            self.seconds[phase] += self._since - before

    def total(self) -> float:
        """Returns the seconds since the timer was made, those of no phase included."""
        return self._clock() - self._began
