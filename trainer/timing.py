"""A timer of a step's phases: each second counts in exactly one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

PHASES = ("sample", "verify", "query", "score", "place", "update", "sync")
"""In the order of a step. `verify` is the wait for verdicts after sampling, most of which arrive meanwhile;
`sync` is the sampler's time to free memory and to get the new weights."""


class StepTimer:
    """Seconds by phase. A phase inside another stops the outer one's clock until it ends."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        settle: Callable[[], None] = lambda: None,
        peak_memory: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            settle: returns when the device has finished its work, see `settler`.
            peak_memory: bytes held at most since the last call.
        """
        self._clock = clock
        self._settle = settle
        self._peak_memory = peak_memory
        self._peak_memory()
        self._open: list[str] = []
        self._began = self._since = clock()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.peaks: dict[str, int] = {}
        """Bytes by phase; `other` outside of phases."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The block's time is the phase's; a phase may be entered often."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @property
    def total(self) -> float:
        """Seconds since the timer was made, those of no phase included."""
        return self._clock() - self._began

    def _charge(self) -> None:
        """Adds the time since the last call to the innermost open phase."""
        self._settle()
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
        phase = self._open[-1] if self._open else "other"
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._peak_memory())


def settler(device: torch.device) -> Callable[[], None]:
    """Waits for what CUDA still computes: it returns before its work is done."""
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)
