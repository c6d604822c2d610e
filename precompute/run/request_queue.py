"""Coroutines in one thread sample from an engine that another thread iterates.

coroutine --sample(request)--> queue --requests--> engine.generate --completion--> deliver --> coroutine
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread

from precompute.engines import Completion, Request


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
