"""The judge of teacher and student alike: is the final answer of a response equal to the gold answer?

    response --(solution.find_answer, linear)--> answer --(worker process, math-verify)--> Verdict

Parsing mathematics that a model wrote may take for ever or all memory (2^{2^{2^{...}}}), and no signal and
no thread can stop it. So it happens in worker processes of our own (precompute/verify/process.py): one item
at a time each, killed at a deadline and replaced, with a limit on their memory. This process never parses
mathematics.

The deadline counts from the moment at which a worker that is ready takes the item, so neither the queue nor a
worker's start (some two seconds of imports) is held against an answer. Any thread may call, under asyncio and
pytest too; the workers never import `__main__`.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Self, TypeVar

from precompute.config import AnswerForm, VerifyConfig
from precompute.verify.cache import OutcomeCache
from precompute.verify.final_answer import Solution, find_answer
from precompute.verify.process import Outcome, Pair, WorkerProcess
from precompute.verify.queue import Job, JobQueue
from store.errors import EngineError

VERIFIER_NAME = "math-verify"
VERIFIER_VERSION = f"{version('math-verify')}+antlr{version('antlr4-python3-runtime')}.ampo.2"
"""The versions of math-verify and of its parser, and the revision of our rules around them
(precompute/verify/math.py). Verdicts depend on all three."""

MAX_ANSWER_CHARS = 10_000
"""A longer answer is a mismatch unread, a longer gold unparseable: no problem of ours has one."""
CACHED_CHARS = 64_000_000
"""What is remembered, in characters: some 60,000 pairs as students write them."""
STREAM_WINDOW = 1_024
"""Responses of a stream that may be under way at once."""

_DEFAULTS = VerifyConfig()

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the judge says about one response. That it was cut at the length limit is the caller's matter."""

    is_correct: bool
    """reason == "match"."""
    reason: str
    """One of store.records.VERDICTS."""
    answer: str | None
    """The final answer, as it stands in the response; None when there is none."""
    answer_start: int | None
    """Character offset at which the answer begins: z_c is `response[:answer_start]`."""
    n_answers: int
    """Complete final answers in the response; the last opening alone decides."""
    detail: str = ""
    """Why, in words, where the reason alone does not say it."""
    parsed_answer: str | None = None
    """What was read in the answer, as sympy writes it, cut to 1,000 characters; None where nothing was."""
    parsed_gold: str | None = None
    """What was read in the gold answer; None where nothing was, or no worker was asked."""


def verify_answer(
    *, response: str, gold: str, timeout: float = _DEFAULTS.timeout, answer_form: AnswerForm | None = None
) -> Verdict:
    """The verdict on one response, by workers that start with the first call and end with the process.

    `timeout` in seconds; `answer_form` None takes `\\boxed{}` and `<answer>` alike. Safe from any thread.
    Raises EngineError when no worker can be started.
    """
    return _shared_verifier().submit(response, gold, answer_form, timeout=timeout).result()


class Verifier:
    """Worker processes that judge answers. A context manager; every method may be called from any thread.

    `timeout` is in seconds from dispatch, `memory_mb` the address space of a worker in MiB. Equal (answer,
    gold) pairs are judged once: while one waits the next joins it, afterwards from CACHED_CHARS of memory.
    Timeouts and errors are not remembered.
    """

    def __init__(
        self,
        workers: int = _DEFAULTS.workers,
        timeout: float = _DEFAULTS.timeout,
        memory_mb: int = _DEFAULTS.memory_mb,
    ) -> None:
        self._timeout = timeout
        self._memory_mb = memory_mb
        self._lock = threading.Lock()
        self._jobs = JobQueue(workers)
        self._waiting: dict[tuple[Pair, float], Future[Outcome]] = {}
        self._known = OutcomeCache(CACHED_CHARS)
        self._closed = False
        self._failure: EngineError | None = None
        self._workers: list[WorkerProcess] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def configured(cls, config: VerifyConfig) -> Self:
        """The service as the config's [verify] says."""
        return cls(workers=config.workers, timeout=config.timeout, memory_mb=config.memory_mb)

    def submit(
        self,
        response: str,
        gold: str,
        answer_form: AnswerForm | None = None,
        *,
        opens_think: bool = False,
        timeout: float | None = None,
    ) -> Future[Verdict]:
        """Starts judging. `opens_think`: the prompt ended inside a `<think>` block.

        The future raises EngineError when no worker can be started, and is cancelled by `close(cancel=True)`.
        """
        solution = find_answer(response, form=answer_form, opens_think=opens_think)
        if solution.answer is None:
            why = "the last opening is never closed or holds nothing" if solution.broken else ""
            return _done(_verdict(solution, Outcome("no_answer", why)))
        if len(solution.answer) > MAX_ANSWER_CHARS:
            why = f"the answer has {len(solution.answer)} characters, more than {MAX_ANSWER_CHARS}"
            return _done(_verdict(solution, Outcome("mismatch", why)))
        pair: Pair = gold.strip(), solution.answer.strip()
        with self._lock:
            remembered = self._known.get(pair)
        if remembered is not None:
            return _done(_verdict(solution, remembered))
        outcome = self._judge(pair, self._timeout if timeout is None else timeout)
        return _then(outcome, lambda known: _verdict(solution, known))

    def verify_all(
        self, pairs: Iterable[tuple[str, str]], answer_form: AnswerForm | None = None
    ) -> list[Verdict]:
        """The verdicts on (response, gold) pairs, in their order."""
        futures = [self.submit(response, gold, answer_form) for response, gold in pairs]
        return [future.result() for future in futures]

    def stream(
        self, pairs: Iterable[tuple[str, str]], answer_form: AnswerForm | None = None
    ) -> Iterator[Verdict]:
        """As `verify_all`, for more pairs than memory holds: at most STREAM_WINDOW are under way."""
        under_way: deque[Future[Verdict]] = deque()
        for response, gold in pairs:
            under_way.append(self.submit(response, gold, answer_form))
            if len(under_way) >= STREAM_WINDOW or under_way[0].done():
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def check_golds(self, golds: Iterable[str]) -> list[bool]:
        """For each gold answer: can it be parsed? One that cannot never earns a reward.

        A gold that ran into the deadline is asked once more with four times as much, so that what a data
        set holds does not hang on how busy the machine is.
        """
        pairs: list[Pair] = [(gold.strip(), None) for gold in golds]
        outcomes = [future.result() for future in [self._judge(pair, self._timeout) for pair in pairs]]
        return [
            (self._judge(pair, 4 * self._timeout).result() if outcome.reason == "timeout" else outcome).reason
            == "parsed"
            for pair, outcome in zip(pairs, outcomes, strict=True)
        ]

    def close(self, *, cancel: bool = False) -> None:
        """Ends the workers, after all that was submitted is judged; with `cancel`, at once."""
        with self._lock:
            self._closed = True
            dropped = self._jobs.drain() if cancel else []
        # Outside the lock: the callbacks of a cancelled outcome take it.
        for job in dropped:
            job.outcome.cancel()
        self._jobs.close()
        for worker in self._workers if cancel else ():
            worker.interrupt()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _judge(self, pair: Pair, timeout: float) -> Future[Outcome]:
        if len(pair[0]) > MAX_ANSWER_CHARS:
            why = f"the gold has more than {MAX_ANSWER_CHARS} characters"
            return _done(Outcome("gold_unparseable", why))
        with self._lock:
            known = self._known.get(pair)
            if known is not None:
                return _done(known)
            if (pair, timeout) in self._waiting:
                return self._waiting[pair, timeout]
            if self._closed:
                raise RuntimeError("the verifier is closed")
            job = Job(pair, timeout)
            if self._failure is not None:
                job.outcome.set_exception(self._failure)
                return job.outcome
            self._waiting[pair, timeout] = job.outcome
            self._jobs.put(job)
        # Outside the lock: the callback takes it, and runs here when the job is done by now.
        job.outcome.add_done_callback(lambda outcome: self._remember(job, outcome))
        return job.outcome

    def _remember(self, job: Job, outcome: Future[Outcome]) -> None:
        with self._lock:
            self._waiting.pop((job.pair, job.timeout), None)
            if not outcome.cancelled() and outcome.exception() is None:
                self._known.put(job.pair, outcome.result())

    def _serve(self, number: int) -> None:
        """One worker's thread: whatever ends it, nobody waits for a verdict that never comes."""
        held: list[Job] = []
        try:
            self._serve_jobs(number, held)
        except EngineError as failure:
            self._fail(failure, held)
        finally:
            if error := sys.exception():
                self._fail(EngineError(f"a verification thread ended: {type(error).__name__}: {error}"), held)

    def _serve_jobs(self, number: int, held: list[Job]) -> None:
        """Starts a worker, too: Linux ends it together with its starting thread. `held`: what it works on."""
        worker = WorkerProcess(self._memory_mb)
        self._workers.append(worker)
        try:
            while True:
                # Ready before it takes jobs, so that none waits for a start beside an idle worker.
                worker.wait_until_ready()
                held += self._jobs.get(number)
                if not held:
                    return
                for outcome in worker.ask_all([(job.pair, job.timeout) for job in held]):
                    held.pop(0).outcome.set_result(outcome)
                while held:  # interrupted
                    held.pop().outcome.cancel()
        finally:
            worker.kill()

    def _fail(self, failure: EngineError, held: list[Job]) -> None:
        with self._lock:
            self._failure = failure
            held += self._jobs.drain()
        while held:
            held.pop().outcome.set_exception(failure)


def _verdict(solution: Solution, outcome: Outcome) -> Verdict:
    return Verdict(
        is_correct=outcome.reason == "match",
        reason=outcome.reason,
        answer=solution.answer,
        answer_start=solution.answer_start,
        n_answers=solution.count,
        detail=outcome.detail,
        parsed_answer=outcome.parsed_answer,
        parsed_gold=outcome.parsed_gold,
    )


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _then(outcome: Future[Outcome], make: Callable[[Outcome], T]) -> Future[T]:
    """A future of its own for each caller: one who cancels leaves the others theirs."""
    result: Future[T] = Future()

    def finish(done: Future[Outcome]) -> None:
        if done.cancelled():
            result.cancel()
        if not result.set_running_or_notify_cancel():
            return
        if error := done.exception():
            result.set_exception(error)
        else:
            result.set_result(make(done.result()))

    outcome.add_done_callback(finish)
    return result


_shared: Verifier | None = None
_shared_lock = threading.Lock()


def _shared_verifier() -> Verifier:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Verifier()
            atexit.register(_shared.close, cancel=True)
        return _shared


def _forget_after_fork() -> None:
    """A forked child has none of the parent's threads: it needs workers of its own."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
