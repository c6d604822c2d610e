"""The requests of one `generate` call, as an engine takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from precompute.engines import Request, Requests, Sampling
from precompute.engines.checks import check_lengths

PAUSE = 0.01
"""Seconds until an engine that waits looks for requests again."""


class Feed:
    """Hands out requests while there are any.

    Raises EngineError for one that does not fit: at once in a sequence, else when it is taken.
    """

    def __init__(self, requests: Requests, sampling: Sampling, context_length: int | None) -> None:
        self._sampling = sampling
        self._context_length = context_length
        self._left: int | None = None
        if isinstance(requests, Sequence):
            check_lengths([each for each in requests if each is not None], sampling, context_length)
            self._left = len(requests)
        self._requests: Iterator[Request | None] = iter(requests)
        self.ended = self._left == 0
        """True if no more requests will come."""
        self.dry = False
        """True if nothing was there at the last look."""

    def take(self, room: int) -> list[Request]:
        """Returns the requests that are there, at most `room` of them."""
        taken: list[Request] = []
        while len(taken) < room and not self.ended:
            try:
                request = next(self._requests)
            except StopIteration:
                self.ended = True
                break
            if self._left is not None:
                self._left -= 1
                self.ended = self._left == 0
            self.dry = request is None
            if request is None:
                break
            check_lengths([request], self._sampling, self._context_length)
            taken.append(request)
        return taken

    def wait(self) -> None:
        """Pauses an engine that has nothing to do."""
        time.sleep(PAUSE)
