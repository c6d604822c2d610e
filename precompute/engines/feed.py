"""The requests of one `generate` call, as an engine takes them."""

from __future__ import annotations

import time
from operator import length_hint

from precompute.engines import Request, Requests, Sampling
from store.errors import EngineError

PAUSE = 0.01
"""Seconds until an engine that waits looks for requests again."""


class Feed:
    """Hands out requests while there are any."""

    def __init__(self, requests: Requests, sampling: Sampling, context_length: int | None) -> None:
        """`context_length`: the positions that prompt and completion share; None: no limit."""
        self._requests = iter(requests)
        self._sampling = sampling
        self._context_length = context_length
        self.ended = self._is_exhausted()
        """True if no more requests will come."""
        self.dry = False
        """True if nothing was there at the last look."""

    def take(self, room: int) -> list[Request]:
        """Returns the requests that are there, at most `room` of them. EngineError if one does not fit."""
        taken: list[Request] = []
        while len(taken) < room and not self.ended:
            try:
                request = next(self._requests)
            except StopIteration:
                self.ended = True
                break
            self.ended = self._is_exhausted()
            self.dry = request is None
            if request is None:
                break
            self._check_length(request)
            taken.append(request)
        return taken

    def wait(self) -> None:
        """Pauses an engine that has nothing to do."""
        time.sleep(PAUSE)

    def _is_exhausted(self) -> bool:
        """Returns True at the end of a sequence; the end of a generator shows at the next look only."""
        return length_hint(self._requests, 1) == 0

    def _check_length(self, request: Request) -> None:
        prompt, most = len(request.prompt_ids), self._context_length
        if not prompt:
            raise EngineError(f"request {request.request_id} has an empty prompt; a prompt needs one token")
        if most is not None and prompt + self._sampling.max_tokens > most:
            raise EngineError(
                f"max_tokens = {self._sampling.max_tokens} and a prompt of {prompt} tokens exceed the "
                f"model's {most} positions; max_tokens may be {max(most - prompt, 0)} at most"
            )
