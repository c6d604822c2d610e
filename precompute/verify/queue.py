"""Pairs on their way to workers: each worker has a queue of its own, and takes from others when it is empty.

Pairs with the same gold answer go to the same worker where nobody has to wait for that: what it has read it
remembers, and its grammar has learnt what such formulas look like. While many wait a worker gets several at
once, so that it need not wait for this process between them; the last ones are given out one by one.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from precompute.verify.process import Outcome, Pair

TOGETHER = 16
"""Pairs that a worker gets at once."""
TOGETHER_CHARS = 1_000
"""Characters of the pairs behind the first: a worker that computes reads nothing, and what is sent to it must
fit into a pipe even where JSON makes twelve bytes of a character (16 KiB on some systems)."""


class Job:
    """A pair on its way."""

    __slots__ = ("outcome", "pair", "timeout")

    def __init__(self, pair: Pair, timeout: float) -> None:
        self.pair = pair
        self.timeout = timeout
        """Seconds from the moment at which a worker takes it."""
        self.outcome: Future[Outcome] = Future()

    @property
    def size(self) -> int:
        """Characters."""
        return sum(len(text) for text in self.pair if text is not None)


class JobQueue:
    """What waits, by worker (0 to workers - 1). Every method may be called from any thread."""

    def __init__(self, workers: int) -> None:
        self._waiting: list[deque[Job]] = [deque() for _ in range(workers)]
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job) -> None:
        """Queues a job with the worker that gets all of its gold answer."""
        with self._changed:
            self._waiting[hash(job.pair[0]) % len(self._waiting)].append(job)
            self._changed.notify()

    def get(self, worker: int) -> list[Job]:
        """The next jobs for a worker, which waits for one; none once the queue is closed and empty."""
        with self._changed:
            while not any(self._waiting):
                if self._closed:
                    return []
                self._changed.wait()
            jobs = self._waiting[worker] or max(self._waiting, key=len)
            taken, room = [jobs.popleft()], TOGETHER_CHARS
            for _ in range(min(TOGETHER, len(jobs) // 4) - 1):
                room -= jobs[0].size
                if room < 0:
                    break
                taken.append(jobs.popleft())
            return taken

    def close(self) -> None:
        """What waits is still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def drain(self) -> list[Job]:
        """Takes all that waits."""
        with self._changed:
            taken = [job for jobs in self._waiting for job in jobs]
            for jobs in self._waiting:
                jobs.clear()
            return taken
