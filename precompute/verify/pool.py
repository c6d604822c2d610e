"""Worker processes that run a verifier and are killed at a deadline, by `pebble.ProcessPool`.

Two things are added to it. A worker that dies while idle breaks a pool: the pool is replaced, and the pending
requests go to the next one. And a starting worker would run the user's script a second time, so the script is
hidden from it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from precompute.verify.base import Outcome, Request
from precompute.verify.worker import run, start
from store.errors import EngineError

STARTS = 3
"""Number of pools in a row that may break without an outcome."""


class WorkerPool:
    """Processes that verify one request at a time each. Every method may be called from any thread.

    A deadline begins when a worker that is ready takes the request. The workers start with the first one.
    """

    def __init__(self, verifier: str, *, threshold: float, workers: int, memory_mb: int) -> None:
        arguments = (verifier, threshold, memory_mb)
        self._new_pool = partial(
            ProcessPool, workers, initializer=start, initargs=arguments, context=_Context()
        )
        self._memory_mb = memory_mb
        self._lock = threading.RLock()
        self._pending: set[Future[Outcome]] = set()
        self._broken = 0
        self._closed = False
        self._pool = self._new_pool()

    def submit(self, request: Request, timeout: float) -> Future[Outcome]:
        """Starts a verification with a deadline in seconds.

        The future raises EngineError when no worker can be started, and is cancelled by `close(cancel=True)`.
        """
        result: Future[Outcome] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier is closed")
            self._pending.add(result)
        result.add_done_callback(self._pending.discard)
        self._schedule(request, timeout, result)
        return result

    def close(self, *, cancel: bool = False) -> None:
        """Ends the workers, after all that was submitted is verified; with `cancel`, at once."""
        with self._lock:
            self._closed = True
            pending = list(self._pending)
        try:
            if not cancel:
                wait(pending)
        finally:
            for result in pending:
                result.cancel()
            _end(self._pool)

    def _schedule(self, request: Request, timeout: float, result: Future[Outcome]) -> None:
        with self._lock:
            pool = self._pool
            task: Future[Outcome] = Future()
            try:
                task = pool.schedule(run, args=(request, timeout), timeout=timeout)
            except RuntimeError:  # It is broken, or its processes cannot be started.
                task.set_exception(BrokenProcessPool())

        def finish(task: Future[Outcome]) -> None:
            if result.cancelled():
                return
            if isinstance(task.exception(), BrokenProcessPool) and self._is_replaced(pool):
                self._schedule(request, timeout, result)
            elif result.set_running_or_notify_cancel():
                self._settle(task, timeout, result)

        task.add_done_callback(finish)

    def _is_replaced(self, broken: ProcessPool) -> bool:
        """Replaces a broken pool by another, once. Returns False after STARTS attempts in a row."""
        with self._lock:
            if broken is self._pool:
                if self._broken == STARTS:
                    return False
                self._broken += 1
                # From a thread of its own: this one may belong to the pool.
                threading.Thread(target=_end, args=(broken,), daemon=True).start()
                self._pool = self._new_pool()
            return True

    def _settle(self, task: Future[Outcome], timeout: float, result: Future[Outcome]) -> None:
        error = task.exception()
        if isinstance(error, BrokenProcessPool):
            why = f"(verify.memory_mb = {self._memory_mb} too small?)"
            result.set_exception(EngineError(f"no verification worker can be started {why}"))
            return
        self._broken = 0
        if isinstance(error, TimeoutError):
            result.set_result(Outcome("timeout", f"no verdict within {timeout:g} s"))
        elif isinstance(error, ProcessExpired):
            why = f"the worker ended with exit code {error.exitcode}, out of memory?"
            result.set_result(Outcome("error", why))
        elif error is not None:
            result.set_exception(error)
        else:
            result.set_result(task.result())


def _end(pool: ProcessPool) -> None:
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join()


_starting = threading.Lock()
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
"""Workers' own: sympy's results do not vary, and no file of the working directory shadows a module."""


@contextmanager
def _hidden_parent() -> Iterator[None]:
    """Hides from a starting worker the user's script, Ctrl-C, and that its parent is daemonic and may have no
    children."""
    with _starting:
        main, before = sys.modules["__main__"], {name: os.environ.get(name) for name in _ENVIRONMENT}
        config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
        daemon = config.get("daemon", False)
        sys.modules["__main__"], config["daemon"] = ModuleType("__main__"), False
        os.environ.update(_ENVIRONMENT)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value
            sys.modules["__main__"], config["daemon"] = main, daemon


class _Process(SpawnProcess):
    def start(self) -> None:
        with _hidden_parent():
            super().start()


class _Context(SpawnContext):
    Process = _Process
