"""Coroutines under way in a thread of their own, for a caller that is none."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Calls(Generic[T]):
    """A context manager; leaving it cancels what is under way and then awaits `on_close`."""

    def __init__(self, on_close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.running = 0
        """Coroutines whose result has not been taken."""
        self._on_close = on_close
        self._tasks: set[asyncio.Task[T]] = set()
        self._ended: queue.SimpleQueue[asyncio.Task[T]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> None:
        """Returns at once."""
        self.running += 1
        self._loop.call_soon_threadsafe(self._begin, coroutine)

    def take(self, timeout: float | None) -> list[T]:
        """The result of the coroutine that ended first, alone in a list; an empty one after `timeout`
        seconds (None: never). Raises what the coroutine raised."""
        try:
            ended = self._ended.get(timeout=timeout)
        except queue.Empty:
            return []
        self.running -= 1
        return [ended.result()]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, or asyncio complains about those that nobody takes
            self._ended.put(task)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        # These alone: the tasks that they have started are theirs to end.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._on_close()
