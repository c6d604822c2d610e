"""Turns judged completions into traces on disk, beside the engine: it never waits for a verdict or a disk.

engine --submit--> verifier --verdict--> [thread: Trace, part] --append--> store
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from precompute.verify.verifier import Verdict
from store.records import Trace

MakeTrace = Callable[[Verdict], Trace]


class Collector:
    """A context manager with a thread that writes a part every `part_traces` traces or `part_seconds`.

    Left in the ordinary way, all that was submitted is on disk; left by an exception, all that was judged.
    """

    def __init__(
        self,
        append: Callable[[Sequence[Trace]], object],
        *,
        part_traces: int,
        part_seconds: float,
        on_trace: Callable[[Trace], None],
    ) -> None:
        self._append = append
        self._part_traces = part_traces
        self._part_seconds = part_seconds
        self._on_trace = on_trace
        self._judged: queue.SimpleQueue[tuple[MakeTrace, Future[Verdict]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open = 0
        self._executor = ThreadPoolExecutor(max_workers=1)

    def submit(self, verdict: Future[Verdict], make_trace: MakeTrace) -> None:
        """The trace is made and kept once the verdict is there. Raises what the thread failed with."""
        self.check()
        with self._changed:
            self._open += 1
        verdict.add_done_callback(lambda done: self._judged.put((make_trace, done)))

    def wait(self) -> None:
        """Returns when every submitted completion is judged. Raises what the thread failed with."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._work.done())
        self.check()

    def __enter__(self) -> Self:
        self._work = self._executor.submit(self._collect)
        self._work.add_done_callback(self._notify)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._judged.put(None)
            self._executor.shutdown()
        if kind is None:
            self._work.result()

    def check(self) -> None:
        """Raises what the thread failed with."""
        if self._work.done():
            self._work.result()

    def _notify(self, _: object = None) -> None:
        with self._changed:
            self._changed.notify_all()

    def _collect(self) -> None:
        ready: list[Trace] = []
        deadline = 0.0
        while True:
            try:
                item = self._judged.get(timeout=max(deadline - time.monotonic(), 0) if ready else None)
            except queue.Empty:
                self._append(ready)
                ready = []
                continue
            if item is None:
                self._append(ready)
                return
            deadline = deadline if ready else time.monotonic() + self._part_seconds
            ready.append(self._trace(*item))
            if len(ready) >= self._part_traces:
                self._append(ready)
                ready = []

    def _trace(self, make_trace: MakeTrace, verdict: Future[Verdict]) -> Trace:
        trace = make_trace(verdict.result())
        self._on_trace(trace)
        with self._changed:
            self._open -= 1
        self._notify()
        return trace
