"""The requests of one `generate` call, as an engine takes them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from precompute.engines import Request, Requests, Sampling
from precompute.engines.checks import check_lengths

PAUSE = 0.01
"""Seconds until an idle engine asks again."""


class Feed:
    """Hands out requests while there are any; each is checked before it is handed out.

    Raises EngineError for one that does not fit: of a sequence at once.
    """

    def __init__(self, requests: Requests, sampling: Sampling, context_length: int | None) -> None:
        self._sampling = sampling
        self._context_length = context_length
        self._to_come = math.inf
        if isinstance(requests, Sequence):
            given = [request for request in requests if request is not None]
            check_lengths(given, sampling, context_length)
            requests, self._to_come = given, len(given)
        self._requests = iter(requests)
        self.dry = False
        """Nothing was there when it was last asked for more."""

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._to_come <= 0

    def take(self, room: int) -> list[Request]:
        """Up to `room` requests: those that are there now."""
        taken: list[Request] = []
        while len(taken) < room and not self.ended:
            try:
                request = next(self._requests)
            except StopIteration:
                self._to_come = 0
                break
            self.dry = request is None
            if request is None:
                break
            check_lengths([request], self._sampling, self._context_length)
            taken.append(request)
            self._to_come -= 1
        return taken

    def wait(self) -> None:
        """For an engine with nothing to do: returns when it is time to ask again."""
        time.sleep(PAUSE)
