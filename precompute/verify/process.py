"""One worker process of the judge, seen from the parent: started, asked, killed, replaced."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from store.errors import EngineError

START_SECONDS = 60.0
"""A worker that is not ready by then is an error of the installation."""

TAKE_SECONDS = 15.0
"""An idle worker takes a pair at once; one that does not has stopped working."""
HAND_OVERS = 3

Pair = tuple[str, str | None]
"""(gold, answer); the answer is None where only the gold is checked."""
Question = tuple[Pair, float]
"""A pair, and the seconds that a worker has for it."""


class Outcome(NamedTuple):
    """What a worker, or its end, says about a pair."""

    reason: str
    """One of store.records.VERDICTS, or `parsed` for a gold checked alone."""
    detail: str
    """Why, in words, where the reason alone does not say it."""
    parsed_gold: str | None = None
    """What was read in the gold answer, as sympy writes it, cut to 1,000 characters."""
    parsed_answer: str | None = None


_WORKER_FILE = Path(__file__).with_name("worker.py")


class WorkerProcess:
    """One worker process and its replacements. For one thread at a time, except `interrupt`."""

    def __init__(self, memory_mb: int) -> None:
        self._memory_mb = memory_mb
        self._interrupted = False
        self._process = self._start()
        self._ready = False
        self._received = b""

    def wait_until_ready(self) -> None:
        """Returns when the process has its imports behind it. EngineError when it never does."""
        if self._ready:
            return
        try:
            self._read(time.monotonic() + START_SECONDS)
        except TimeoutError:
            self.kill()
            raise EngineError(f"a verification worker was not ready in {START_SECONDS:g} s") from None
        except EOFError:
            self.kill()
            raise EngineError(
                f"a verification worker ended at its start with exit code {self._process.returncode}; run "
                f"{sys.executable} {_WORKER_FILE} {self._memory_mb} to see why (verify.memory_mb too small?)"
            ) from None
        self._ready = True

    def ask_all(self, questions: Iterable[Question]) -> Iterator[Outcome]:
        """Has pairs judged, handed over together: the outcomes in their order.

        The process is killed and replaced when a pair, or itself, fails; the pairs behind that one go to the
        next. After an `interrupt` the outcomes end early. EngineError when no worker can be had.
        """
        waiting = deque(questions)
        while waiting and not self._interrupted:
            self._hand_over(waiting)
            yield from self._answers(waiting)

    def _hand_over(self, waiting: Sequence[Question]) -> None:
        """Returns when a worker has taken the first pair. One that died while idle is replaced first: its end
        is not the pair's fault."""
        for _ in range(HAND_OVERS):
            self.wait_until_ready()
            try:
                self._send(waiting)
            except BrokenPipeError:
                self._restart()
                continue
            if self._is_taken():
                return
        raise EngineError(f"{HAND_OVERS} verification workers in a row ended while idle")

    def _answers(self, waiting: deque[Question]) -> Iterator[Outcome]:
        """Takes off `waiting` what is answered, until the process had to be replaced or all are."""
        while waiting:
            _, timeout = waiting.popleft()
            outcome = self._outcome(timeout)
            yield outcome
            if outcome.reason in ("timeout", "error") or (waiting and not self._is_taken()):
                return

    def _outcome(self, timeout: float) -> Outcome:
        """Of the pair that was taken just now."""
        try:
            outcome = self._read(time.monotonic() + timeout)
        except TimeoutError:
            outcome = Outcome("timeout", f"no verdict within {timeout:g} s")
        except EOFError:
            self.kill()
            code = self._process.returncode
            outcome = Outcome("error", f"the worker ended with exit code {code}, out of memory?")
        if outcome.reason in ("timeout", "error"):
            self._restart()
        return outcome

    def _is_taken(self) -> bool:
        """Whether the worker has begun with the next pair; it is replaced when it never does."""
        try:
            self._read(time.monotonic() + TAKE_SECONDS)
        except (EOFError, TimeoutError):
            self._restart()
            return False
        return True

    def kill(self) -> None:
        """Ends the process, whatever it does. Harmless when it has ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def interrupt(self) -> None:
        """Makes the process end, from any thread; the thread that asks it sees it gone."""
        self._interrupted = True
        self._process.kill()

    def _restart(self) -> None:
        self.kill()
        self._process = self._start()
        self._ready = False
        self._received = b""

    def _start(self) -> subprocess.Popen[bytes]:
        # By path and with this process's import path: the working directory and __main__ play no part.
        # A session of its own keeps the terminal's Ctrl-C away from it.
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", str(_WORKER_FILE), str(self._memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"},
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise EngineError(f"a verification worker cannot be started: {error}") from error

    def _send(self, questions: Iterable[Question]) -> None:
        assert self._process.stdin is not None
        requests = [{"gold": pair[0], "answer": pair[1], "timeout": timeout} for pair, timeout in questions]
        lines = memoryview("".join(f"{json.dumps(request)}\n" for request in requests).encode())
        while lines:
            lines = lines[self._process.stdin.write(lines) :]

    def _read(self, deadline: float) -> Outcome:
        assert self._process.stdout is not None
        poller = select.poll()
        poller.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._received:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = self._process.stdout.read(65536)
            if not chunk:
                raise EOFError
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return Outcome(*json.loads(line))
