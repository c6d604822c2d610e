"""Requests on their way to an engine that a thread iterates, from coroutines in another thread.

coroutine --sample(request)--> RequestQueue --requests--> Feed, in engine.generate --completion--> deliver
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from operator import length_hint
from threading import Thread

from precompute.engines import Completion, Request, Requests, Sampling
from store.errors import EngineError

PAUSE = 0.01
"""Seconds until an engine that waits looks for requests again."""


class Feed:
    """The requests of one `generate` call, as an engine takes them."""

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
        if not prompt and not request.messages:
            raise EngineError(f"request {request.request_id} has an empty prompt; a prompt needs one token")
        if most is not None and prompt + self._sampling.max_tokens > most:
            raise EngineError(
                f"max_tokens = {self._sampling.max_tokens} and a prompt of {prompt} tokens exceed the "
                f"model's {most} positions; max_tokens may be {max(most - prompt, 0)} at most"
            )


class RequestQueue:
    """Requests that wait for the engine, and the coroutines that wait for their completions."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()
        self._answers: dict[str, asyncio.Future[Completion]] = {}

    async def sample(self, request: Request, *, first: bool) -> Completion:
        """Returns the request's completion. With `first` the request overtakes all that wait."""
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._answers[request.request_id] = answer
        if first:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)
        return await answer

    def requests(self, work: Future[None]) -> Iterator[Request | None]:
        """Yields what waits, or None, until `work` is done; raises the exception that `work` ended with."""
        while not work.done():
            yield self._waiting.popleft() if self._waiting else None
        work.result()

    def deliver(self, completion: Completion) -> None:
        """Wakes the coroutine that waits for the completion."""
        answer = self._answers.pop(completion.request_id)

        def wake() -> None:
            if not answer.done():  # or the coroutine was cancelled
                answer.set_result(completion)

        answer.get_loop().call_soon_threadsafe(wake)


@contextmanager
def loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own; tasks that are unfinished at the end are cancelled."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
