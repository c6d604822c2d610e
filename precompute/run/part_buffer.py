"""Verified traces that wait to become a part of the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from store.records import Trace

Append = Callable[[Sequence[Trace]], object]
"""Writes one part, e.g. `StoreWriter.append`."""


class PartBuffer:
    """Writes a part once it has `part_traces` traces, or a trace arrives `part_seconds` after its first."""

    def __init__(self, append: Append, *, part_traces: int, part_seconds: float) -> None:
        self._append = append
        self._part_traces = part_traces
        self._part_seconds = part_seconds
        self._traces: list[Trace] = []
        self._deadline = 0.0
        self._failed = False

    def add(self, trace: Trace) -> None:
        """Raises what `append` raises."""
        if not self._traces:
            self._deadline = time.monotonic() + self._part_seconds
        self._traces.append(trace)
        if len(self._traces) >= self._part_traces or time.monotonic() >= self._deadline:
            self.write()

    def write(self) -> None:
        """Writes a part with the traces that wait, if any; nothing more once `append` has failed."""
        traces, self._traces = self._traces, []
        if traces and not self._failed:
            self._failed = True
            self._append(traces)
            self._failed = False
