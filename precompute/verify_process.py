"""One worker process of the judge, seen from the parent: started, asked, killed, replaced."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from store.errors import EngineError

START_SECONDS = 60.0
"""A worker that is not ready by then is an error of the installation."""

TAKE_SECONDS = 10.0
"""An idle worker takes a pair at once; one that does not has stopped working."""
HAND_OVERS = 3

Pair = tuple[str, str | None]
"""(gold, answer); the answer is None where only the gold is checked."""


class Outcome(NamedTuple):
    """What a worker, or its end, says about a pair."""

    reason: str
    """One of store.records.VERDICTS, or `parsed` for a gold checked alone."""
    detail: str
    """Why, in words, where the reason alone does not say it."""
    parsed_gold: str | None = None
    """What was read in the gold answer, as sympy writes it, cut to 1,000 characters."""
    parsed_answer: str | None = None


_WORKER_FILE = Path(__file__).with_name("verify_worker.py")


class WorkerProcess:
    """One worker process and its replacements. For one thread at a time, except `interrupt`."""

    def __init__(self, memory_mb: int) -> None:
        self._memory_mb = memory_mb
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

    def ask(self, pair: Pair, timeout: float) -> Outcome:
        """Has one pair judged; the process is killed and replaced at the deadline, or when it fails."""
        deadline = self._hand_over(pair, timeout)
        try:
            outcome = self._read(deadline)
        except TimeoutError:
            outcome = Outcome("timeout", f"no verdict within {timeout:g} s")
        except EOFError:
            self.kill()
            code = self._process.returncode
            outcome = Outcome("error", f"the worker ended with exit code {code}, out of memory?")
        if outcome.reason in ("timeout", "error"):
            self._restart()
        return outcome

    def _hand_over(self, pair: Pair, timeout: float) -> float:
        """The deadline of the pair, which a worker has taken. One that died while idle is replaced first:
        its end is not the pair's fault."""
        for _ in range(HAND_OVERS):
            self.wait_until_ready()
            deadline = time.monotonic() + timeout
            try:
                self._send({"gold": pair[0], "answer": pair[1], "timeout": timeout})
                self._read(deadline + TAKE_SECONDS)
            except (BrokenPipeError, EOFError, TimeoutError):
                self._restart()
            else:
                return deadline
        raise EngineError(f"{HAND_OVERS} verification workers in a row ended while idle")

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
        self._process.kill()

    def _restart(self) -> None:
        self.kill()
        self._process = self._start()
        self._ready = False
        self._received = b""

    def _start(self) -> subprocess.Popen[bytes]:
        # By path and with this process's import path: the working directory and __main__ play no part.
        # A session of its own keeps the terminal's Ctrl-C away from it.
        return subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_WORKER_FILE), str(self._memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"},
            start_new_session=True,
            bufsize=0,
        )

    def _send(self, request: dict[str, str | float | None]) -> None:
        assert self._process.stdin is not None
        line = memoryview(json.dumps(request).encode() + b"\n")
        while line:
            line = line[self._process.stdin.write(line) :]

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
