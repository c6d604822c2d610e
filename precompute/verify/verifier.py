"""The verifier of teacher and student alike: is the final answer of a response equal to the gold answer?

    response --(final_answer.find_answer, linear)--> answer --(worker process, verify/registry.py)--> Verdict

Parsing mathematics that a model wrote may take forever or all memory (2^{2^{2^{...}}}), and no signal and no
thread can stop it. So it happens in worker processes with a limit on their memory, which are killed at a
deadline (precompute/verify/pool.py). This process never parses mathematics.

Every problem may have its own verifier: the one that its row names, else the one of its source in
`[verify.by_source]`, else `[verify] default`.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self, TypeVar

from precompute.config import VerifyConfig
from precompute.verify.base import Outcome, Request
from precompute.verify.final_answer import FinalAnswer, answer_form_of, find_answer
from precompute.verify.plain_numbers import compare_numbers, is_own_expression
from precompute.verify.pool import WorkerPool
from precompute.verify.registry import PAIRWISE, chosen_verifier, is_verls, verifier_record
from store.records import AnswerForm, Problem

MATH_VERSIONS = dict([verifier_record("math")])
"""Name and version of the verifier `math`."""

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
    score: float = 0.0
    """The number that the verifier returned; of one that returns a bool 1 for a correct answer, else 0."""
    verifier: str = ""
    """Name and version."""


def verify_answer(
    *, response: str, gold: str, timeout: float = _DEFAULTS.timeout, answer_form: AnswerForm | None = None
) -> Verdict:
    """Returns the verdict on one response. Workers start with the first call and end with the process.

    `timeout` in seconds; `answer_form` None takes `\\boxed{}` and `<answer>` alike. Safe from any thread.
    Raises EngineError when no worker can be started.
    """
    problem = Problem(question="", answer=gold)
    return _shared_verifier().submit(response, problem, answer_form, timeout=timeout).result()


@dataclass(frozen=True, slots=True)
class _Kind:
    """A verifier by name, with its worker processes."""

    name: str
    """As the config or the row names it."""
    record: tuple[str, str]
    """Name and version as the store records them."""
    reads_response: bool
    """It finds the answer in the response itself."""
    pool: WorkerPool


class Verifier:
    """Verifies responses in worker processes. A context manager; every method may be called from any thread.

    Equal (gold, answer) pairs are verified once: while one is pending the next joins it, afterwards it is
    cached. Timeouts and errors are not cached.
    """

    def __init__(self, config: VerifyConfig = _DEFAULTS) -> None:
        """Raises ConfigError where the config names a verifier that does not exist."""
        self.config = config
        self._lock = threading.RLock()
        self._kinds: dict[str, _Kind] = {}
        self._known: dict[tuple[str, Request, float], Future[Outcome]] = {}
        self._kind(config.default, "verify.default")
        for source, name in config.by_source.items():
            self._kind(name, f"verify.by_source.{source}")

    def name_for(self, problem: Problem) -> str:
        """Returns the name of the problem's verifier."""
        return problem.verifier or self.config.by_source.get(problem.source) or self.config.default

    def record_for(self, problem: Problem) -> tuple[str, str]:
        """Returns the name and version of the problem's verifier. ConfigError where it does not exist."""
        return self._kind(self.name_for(problem), f"verifier of problem {problem.problem_id}").record

    def versions(self, problems: Iterable[Problem]) -> dict[str, str]:
        """Returns name -> version of the problems' verifiers."""
        return dict(map(self.record_for, problems))

    def submit(
        self,
        response: str,
        problem: Problem | str,
        answer_form: AnswerForm | None = None,
        *,
        opens_think: bool = False,
        timeout: float | None = None,
    ) -> Future[Verdict]:
        """Starts verifying a response.

        The future raises EngineError when no worker can be started, and is cancelled by `close(cancel=True)`.

        Args:
            problem: or its gold answer alone.
            answer_form: mark of the final answer; None: any, `(B)` where the prompt demands it.
            opens_think: the prompt ended inside a `<think>` block.
            timeout: in seconds; None: `verify.timeout`.
        """
        problem = _problem(problem)
        kind = self._kind(self.name_for(problem), f"verifier of problem {problem.problem_id}")
        if answer_form is None and answer_form_of(problem.system_prompt or "", problem.question) == "letter":
            answer_form = "letter"
        found = find_answer(response, form=answer_form, opens_think=opens_think)
        if found.answer is None and not kind.reads_response:
            why = "the last opening is never closed or holds nothing" if found.broken else ""
            return _done(_verdict(found, Outcome("no_answer", why), kind))
        answer = (found.answer or "").strip()
        if len(answer) > MAX_ANSWER_CHARS:
            why = f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}"
            return _done(_verdict(found, Outcome("mismatch", why), kind))
        gold, question = problem.answer.strip(), problem.question
        if self.config.simplified and kind.name == "math" and is_own_expression(question, gold, answer):
            why = "the answer is the question's own expression"
            return _done(_verdict(found, Outcome("unsimplified", why), kind))
        request = Request(gold, answer, question, response, problem.metadata, problem.source)
        outcome = self._outcome(kind, request, self.config.timeout if timeout is None else timeout)
        return _verdict_of(outcome, found, kind)

    def stream(
        self, rows: Iterable[tuple[str, Problem | str]], answer_form: AnswerForm | None = None
    ) -> Iterator[Verdict]:
        """Yields the verdicts on (response, problem or gold answer) rows, in their order.

        At most STREAM_WINDOW responses are in memory.
        """
        in_flight: deque[Future[Verdict]] = deque()
        for response, problem in rows:
            in_flight.append(self.submit(response, problem, answer_form))
            if len(in_flight) >= STREAM_WINDOW or in_flight[0].done():
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()

    def gold_errors(self, problems: Sequence[Problem | str]) -> list[str | None]:
        """Returns for each gold answer why its verifier cannot use it; None: it can. An unusable one never
        earns a reward.

        A gold that ran into the deadline is tried once more with four times as much time, so that the result
        does not depend on how busy the machine is.
        """

        def checked(problem: Problem, timeout: float) -> Future[Outcome]:
            kind = self._kind(self.name_for(problem), f"verifier of problem {problem.problem_id}")
            gold, facts = problem.answer.strip(), (problem.metadata, problem.source)
            return self._outcome(kind, Request(gold, gold, problem.question, gold, *facts), timeout)

        given = [_problem(problem) for problem in problems]
        pending = [checked(problem, self.config.timeout) for problem in given]
        outcomes = [outcome.result() for outcome in pending]
        for index, outcome in enumerate(outcomes):
            if outcome.reason == "timeout":
                outcomes[index] = checked(given[index], 4 * self.config.timeout).result()
        return [None if each.reason in ("match", "mismatch") else each.detail for each in outcomes]

    def close(self, *, cancel: bool = False) -> None:
        """Ends the workers, after all that was submitted is verified; with `cancel`, at once."""
        for kind in list(self._kinds.values()):
            kind.pool.close(cancel=cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _kind(self, name: str, key: str) -> _Kind:
        with self._lock:
            if name not in self._kinds:
                record = verifier_record(name, key=key)
                limits = {"workers": self.config.workers, "memory_mb": self.config.memory_mb}
                pool = WorkerPool(_absolute(name), threshold=self.config.threshold, **limits)
                self._kinds[name] = _Kind(name, record, is_verls(chosen_verifier(name, key=key)), pool)
            return self._kinds[name]

    def _outcome(self, kind: _Kind, request: Request, timeout: float) -> Future[Outcome]:
        gold, answer = request.gold, request.answer
        if len(gold) > MAX_ANSWER_CHARS:
            return _done(Outcome("gold_unparseable", f"the gold has more than {MAX_ANSWER_CHARS} characters"))
        if kind.name not in PAIRWISE:
            return kind.pool.submit(request, timeout)
        if kind.name == "math" and (outcome := compare_numbers(gold, answer)):
            return _done(outcome)
        key = kind.name, Request(gold, answer), timeout
        with self._lock:
            if key in self._known:
                return self._known[key]
            pending = self._known[key] = kind.pool.submit(key[1], timeout)
            if len(self._known) > CACHED_PAIRS:
                del self._known[next(iter(self._known))]
        pending.add_done_callback(lambda outcome: self._forget(key, outcome))
        return pending

    def _forget(self, key: tuple[str, Request, float], outcome: Future[Outcome]) -> None:
        """Drops an outcome that is too long to cache, and one that another try may change."""
        failed = outcome.cancelled() or outcome.exception() or outcome.result().reason in ("timeout", "error")
        if failed or len(key[1].gold) + len(key[1].answer) > CACHED_CHARS:
            self._known.pop(key, None)


def _problem(problem: Problem | str) -> Problem:
    return Problem(question="", answer=problem) if isinstance(problem, str) else problem


def _absolute(kind: str) -> str:
    """Returns `file.py:function` with an absolute path: a worker may start in another directory."""
    where, colon, function = kind.rpartition(":")
    return f"{Path(where).resolve()}:{function}" if colon and where.endswith(".py") else kind


def _verdict(found: FinalAnswer, outcome: Outcome, kind: _Kind) -> Verdict:
    is_correct = outcome.reason == "match"
    return Verdict(
        is_correct=is_correct,
        score=float(is_correct) if outcome.score is None else outcome.score,
        verifier=" ".join(kind.record),
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


def _verdict_of(outcome: Future[Outcome], found: FinalAnswer, kind: _Kind) -> Future[Verdict]:
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
            result.set_result(_verdict(found, done.result(), kind))

    outcome.add_done_callback(finish)
    return result


@cache
def _shared_verifier() -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close, cancel=True)
    return verifier


# A forked child has none of the parent's threads: it needs workers of its own.
os.register_at_fork(after_in_child=_shared_verifier.cache_clear)
