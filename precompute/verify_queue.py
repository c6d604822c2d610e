"""Pairs on their way to workers: each worker has a queue of its own, and takes from others when it is empty.

Pairs with the same gold answer go to the same worker where nobody has to wait for that: what it has read it
remembers, and its grammar has learnt what such formulas look like.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from precompute.verify_process import Outcome, Pair


class Job:
    """A pair on its way."""

    __slots__ = ("outcome", "pair", "timeout")

    def __init__(self, pair: Pair, timeout: float) -> None:
        self.pair = pair
        self.timeout = timeout
        """Seconds from the moment at which a worker takes it."""
        self.outcome: Future[Outcome] = Future()


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

    def get(self, worker: int) -> Job | None:
        """The next job for a worker, which waits for one; None once the queue is closed and empty."""
        with self._changed:
            while not any(self._waiting):
                if self._closed:
                    return None
                self._changed.wait()
            return (self._waiting[worker] or max(self._waiting, key=len)).popleft()

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
