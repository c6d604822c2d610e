"""The verifier of teacher and student alike: is the final answer of a response equal to the gold answer?

    response --(final_answer.find_answer, linear)--> answer --(worker process, verify/registry.py)--> Verdict

Parsing mathematics that a model wrote may take forever or all memory (2^{2^{2^{...}}}), and no signal and no
thread can stop it. So it happens in worker processes with a limit on their memory, which are killed at a
deadline (precompute/verify/pool.py). This process never parses mathematics.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

from precompute.config import AnswerForm, VerifyConfig
from precompute.verify.base import Outcome, Request
from precompute.verify.final_answer import FinalAnswer, find_answer
from precompute.verify.plain_numbers import compare_numbers
from precompute.verify.pool import WorkerPool
from precompute.verify.registry import PAIRWISE, verifier_record

VERIFIER_NAME, VERIFIER_VERSION = verifier_record("math")

MAX_ANSWER_CHARS = 10_000
"""A longer answer is a mismatch unread, a longer gold unparseable: no problem of ours has one."""
CACHED_PAIRS = 20_000
CACHED_CHARS = 1_000
"""A longer pair is verified each time."""
STREAM_WINDOW = 1_024
"""Responses of a stream that may be in flight at once."""

_DEFAULTS = VerifyConfig()

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict on one response. Whether it was cut at the length limit is the caller's to check."""

    is_correct: bool
    """reason == "match"."""
    reason: str
    """One of store.records.VERDICTS."""
    answer: str | None
    """The final answer as the response has it; None when it has none."""
    answer_start: int | None
    """Character offset at which the answer begins: z_c is `response[:answer_start]`."""
    n_answers: int
    """Complete final answers in the response; the last opening alone decides."""
    detail: str = ""
    """The cause in words, where the reason alone does not give it."""
    parsed_answer: str | None = None
    """The answer as the verifier read it, cut to 1,000 characters; None where it could not be read."""
    parsed_gold: str | None = None
    """The gold answer as the verifier read it; None where it could not be read, or was not needed."""


def verify_answer(
    *, response: str, gold: str, timeout: float = _DEFAULTS.timeout, answer_form: AnswerForm | None = None
) -> Verdict:
    """Returns the verdict on one response. Workers start with the first call and end with the process.

    `timeout` in seconds; `answer_form` None takes `\\boxed{}` and `<answer>` alike. Safe from any thread.
    Raises EngineError when no worker can be started.
    """
    return _shared_verifier().submit(response, gold, answer_form, timeout=timeout).result()


class Verifier:
    """Verifies responses in worker processes. A context manager; every method may be called from any thread.

    Equal (gold, answer) pairs are verified once: while one is pending the next joins it, afterwards it is
    cached. Timeouts and errors are not cached.
    """

    def __init__(
        self,
        workers: int = _DEFAULTS.workers,
        timeout: float = _DEFAULTS.timeout,
        memory_mb: int = _DEFAULTS.memory_mb,
        kind: str = _DEFAULTS.default,
    ) -> None:
        """`timeout` in seconds, `memory_mb` the address space of a worker in MiB, `kind` as `verify.default`.

        Raises ConfigError where `kind` names no verifier.
        """
        self.name, self.version = verifier_record(kind)
        self._kind = kind
        self._timeout = timeout
        self._pool = WorkerPool(_absolute(kind), workers=workers, memory_mb=memory_mb)
        self._lock = threading.RLock()
        self._known: dict[tuple[Request, float], Future[Outcome]] = {}

    @classmethod
    def configured(cls, config: VerifyConfig) -> Self:
        """Returns the verifier that the config's [verify] describes."""
        return cls(config.workers, config.timeout, config.memory_mb, config.default)

    def submit(
        self,
        response: str,
        gold: str,
        answer_form: AnswerForm | None = None,
        *,
        opens_think: bool = False,
        timeout: float | None = None,
        question: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> Future[Verdict]:
        """Starts verifying a response; `opens_think`: the prompt ended inside a `<think>` block.

        The future raises EngineError when no worker can be started, and is cancelled by `close(cancel=True)`.
        """
        found = find_answer(response, form=answer_form, opens_think=opens_think)
        if found.answer is None:
            why = "the last opening is never closed or holds nothing" if found.broken else ""
            return _done(_verdict(found, Outcome("no_answer", why)))
        if len(found.answer) > MAX_ANSWER_CHARS:
            why = f"the answer has {len(found.answer)} characters, more than {MAX_ANSWER_CHARS}"
            return _done(_verdict(found, Outcome("mismatch", why)))
        request = Request(gold.strip(), found.answer.strip(), question, response, metadata)
        outcome = self._outcome(request, self._timeout if timeout is None else timeout)
        return _verdict_of(outcome, found)

    def stream(
        self, rows: Iterable[tuple[str, ...]], answer_form: AnswerForm | None = None
    ) -> Iterator[Verdict]:
        """Yields the verdicts on (response, gold) or (response, gold, question) rows, in their order.

        At most STREAM_WINDOW responses are in memory.
        """
        in_flight: deque[Future[Verdict]] = deque()
        for response, gold, *question in rows:
            in_flight.append(self.submit(response, gold, answer_form, question="".join(question)))
            if len(in_flight) >= STREAM_WINDOW or in_flight[0].done():
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()

    def check_golds(self, golds: Sequence[str], questions: Sequence[str] | None = None) -> list[bool]:
        """Returns for each gold answer whether the verifier can use it: one that it cannot earns no reward.

        A gold that ran into the deadline is tried once more with four times as much time, so that the result
        does not depend on how busy the machine is.
        """
        pairs = zip(golds, questions or [""] * len(golds), strict=True)
        requests = [Request(gold.strip(), gold.strip(), question, response=gold) for gold, question in pairs]
        pending = [self._outcome(request, self._timeout) for request in requests]
        reasons = [outcome.result().reason for outcome in pending]
        for index, reason in enumerate(reasons):
            if reason == "timeout":
                reasons[index] = self._outcome(requests[index], 4 * self._timeout).result().reason
        return [reason in ("match", "mismatch") for reason in reasons]

    def close(self, *, cancel: bool = False) -> None:
        """Ends the workers, after all that was submitted is verified; with `cancel`, at once."""
        self._pool.close(cancel=cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _outcome(self, request: Request, timeout: float) -> Future[Outcome]:
        gold, answer = request.gold, request.answer
        if len(gold) > MAX_ANSWER_CHARS:
            return _done(Outcome("gold_unparseable", f"the gold has more than {MAX_ANSWER_CHARS} characters"))
        if self._kind not in PAIRWISE:
            return self._pool.submit(request, timeout)
        if outcome := compare_numbers(gold, answer):
            return _done(outcome)
        key = Request(gold, answer), timeout
        with self._lock:
            if key in self._known:
                return self._known[key]
            pending = self._known[key] = self._pool.submit(key[0], timeout)
            if len(self._known) > CACHED_PAIRS:
                del self._known[next(iter(self._known))]
        pending.add_done_callback(lambda outcome: self._forget(key, outcome))
        return pending

    def _forget(self, key: tuple[Request, float], outcome: Future[Outcome]) -> None:
        """Drops an outcome that is too long to cache, and one that another try may change."""
        failed = outcome.cancelled() or outcome.exception() or outcome.result().reason in ("timeout", "error")
        if failed or len(key[0].gold) + len(key[0].answer) > CACHED_CHARS:
            self._known.pop(key, None)


def _absolute(kind: str) -> str:
    """Returns `file.py:function` with an absolute path: a worker may start in another directory."""
    where, colon, function = kind.rpartition(":")
    return f"{Path(where).resolve()}:{function}" if colon and where.endswith(".py") else kind


def _verdict(found: FinalAnswer, outcome: Outcome) -> Verdict:
    return Verdict(
        is_correct=outcome.reason == "match",
        reason=outcome.reason,
        answer=found.answer,
        answer_start=found.answer_start,
        n_answers=found.count,
        detail=outcome.detail,
        parsed_answer=outcome.parsed_answer,
        parsed_gold=outcome.parsed_gold,
    )


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _verdict_of(outcome: Future[Outcome], found: FinalAnswer) -> Future[Verdict]:
    """Returns a future of its own for each caller, so that cancelling it leaves the others' alone."""
    result: Future[Verdict] = Future()

    def finish(done: Future[Outcome]) -> None:
        if done.cancelled():
            result.cancel()
        if not result.set_running_or_notify_cancel():
            return
        if error := done.exception():
            result.set_exception(error)
        else:
            result.set_result(_verdict(found, done.result()))

    outcome.add_done_callback(finish)
    return result


@cache
def _shared_verifier() -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close, cancel=True)
    return verifier


# A forked child has none of the parent's threads: it needs workers of its own.
os.register_at_fork(after_in_child=_shared_verifier.cache_clear)
