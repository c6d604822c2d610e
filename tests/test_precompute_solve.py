"""Which samples are taken: never more than may be needed, and the same however a run is cut."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precompute.config import FiltersConfig, StoreConfig, TeacherConfig
from precompute.engines import Completion, Request, Sampling
from precompute.problems.prompts import Prompt
from precompute.run.progress import Reporter
from precompute.run.solve import Done, PreparedTeacher, Solver, next_samples, samples_left
from precompute.verify.verifier import Verdict, Verifier
from store.errors import EngineError, StoreError
from store.records import Problem, TeacherRecord, Trace

RIGHT = st.lists(st.sampled_from(list(itertools.product([False, True], repeat=6))), min_size=1, max_size=4)
SPEEDS = st.integers(0, 10**6).map(random.Random)


def teacher(**plan: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"name": "ada", "model": "m", **plan})


class Machine:
    """An engine of any speed; the text of a completion is `problem sample`."""

    name, version = "machine", "1"

    def __init__(
        self, clock: random.Random, *, room: int = 4, seconds: float = 0.0001, fails_after: int | None = None
    ) -> None:
        self.journal: list[str] = []
        """Request ids in the order in which they were begun."""
        self._clock = clock
        self._room = room
        self._seconds = seconds
        self._fails_after = fails_after

    def generate(self, requests: Iterable[Request | None], sampling: Sampling) -> Iterator[Completion]:
        running: list[str] = []
        for request in itertools.chain(requests, itertools.repeat(None)):
            if request is not None:
                running.append(request.request_id)
                self.journal.append(request.request_id)
                if len(self.journal) == self._fails_after:
                    raise EngineError("the machine is out of memory")
                if len(running) < self._room and self._clock.random() < 0.7:
                    continue
            elif not running and iter_ended(requests):
                return
            time.sleep(self._seconds)
            if running:
                yield completion(running.pop(self._clock.randrange(len(running))))

    def close(self) -> None: ...


def iter_ended(requests: Iterable[Request | None]) -> bool:
    """True for a generator that has returned."""
    return cast(Any, requests).gi_frame is None


def completion(request_id: str) -> Completion:
    return Completion(
        request_id=request_id, token_ids=(1, 2), logprobs=(-1.0, -2.0), finish_reason="stop", text=request_id
    )


class Judge:
    """A verifier that knows which samples are right."""

    def __init__(self, right: Mapping[str, Sequence[bool]]) -> None:
        self._right = right

    def submit(self, text: str, *_: Any, **__: Any) -> Future[Verdict]:
        problem_id, _, index = text.rpartition("-")
        right = self._right[problem_id][int(index)]
        verdict: Future[Verdict] = Future()
        verdict.set_result(
            Verdict(
                is_correct=right,
                reason="match" if right else "mismatch",
                answer="1",
                answer_start=0,
                n_answers=1,
            )
        )
        return verdict


def solve(
    plan: TeacherConfig,
    right: Sequence[Sequence[bool]],
    done: Done,
    machine: Machine,
    *,
    append: Callable[[Sequence[Trace]], object] | None = None,
) -> list[tuple[str, int, bool]]:
    """The samples in the order in which they were verified."""
    problems = [Problem(question=str(n), answer="1", source="") for n in range(len(right))]
    record = TeacherRecord(
        name="ada", model="m", revision=None, engine="machine", engine_version="1", chat_template="",
        system_prompt="", chat_template_kwargs={}, sampling={}, tokenizer_fingerprint="",
    )  # fmt: skip
    prepared = PreparedTeacher(config=plan, engine="machine", tokenizer=None, record=record)
    answers = {problem.problem_id: right[n] for n, problem in enumerate(problems)}
    solver = Solver(
        prepared,
        problems,
        {problem: dict(samples) for problem, samples in done.items()},
        verifier=cast(Verifier, Judge(answers)),
        filters=FiltersConfig(),
        reporter=Reporter(),
    )
    solver.prompts = {p.problem_id: Prompt(text="", ids=(1,), opens_think=False) for p in problems}
    traces: list[Trace] = []
    if solver.left:
        solver.run(machine, append or traces.extend, StoreConfig(part_traces=3))
    return [(trace.problem_id, trace.sample_index, trace.is_usable) for trace in traces]


def as_done(journal: list[tuple[str, int, bool]]) -> Done:
    done: Done = {}
    for problem_id, index, usable in journal:
        assert index not in done.setdefault(problem_id, {}), "sampled twice"
        done[problem_id][index] = usable
    return done


def needed(right: Sequence[bool], wanted: int, budget: int) -> dict[int, bool]:
    """The fewest first samples with `wanted` usable ones among them, or the whole budget."""
    samples: dict[int, bool] = {}
    for index in range(budget):
        if sum(samples.values()) == wanted:
            break
        samples[index] = right[index]
    return samples


def by_problem(found: Mapping[int, dict[int, bool]]) -> Done:
    ids = {n: Problem(question=str(n), answer="1", source="").problem_id for n in found}
    return {ids[n]: samples for n, samples in found.items()}


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), RIGHT, SPEEDS, st.data())
def test_only_what_is_needed_is_sampled_and_a_cut_run_ends_with_the_same(
    wanted: int, budget: int, right: Sequence[Sequence[bool]], clock: random.Random, data: st.DataObject
) -> None:
    plan = teacher(until_verified=wanted, max_samples=budget)
    journal = solve(plan, right, {}, Machine(clock))
    expected = by_problem({n: needed(answers, wanted, budget) for n, answers in enumerate(right)})
    assert as_done(journal) == expected
    # Parts are written in the order of the verdicts: a kill loses the end of it.
    kept = journal[: data.draw(st.integers(0, len(journal)))]
    rest = solve(plan, right, as_done(kept), Machine(clock))
    assert as_done(kept + rest) == expected


def test_a_further_try_overtakes_problems_that_wait_for_their_first() -> None:
    machine = Machine(random.Random(0), room=1, seconds=0.005)
    solve(teacher(until_verified=1, max_samples=2), [[False, True]] * 20, {}, machine)
    begun = [int(request_id.rpartition("-")[2]) for request_id in machine.journal]
    assert len(begun) == 40
    # Wave after wave, every first try would come before any second.
    assert 1 in begun[:10]


def test_tries_under_way_count_as_if_they_were_usable() -> None:
    plan = teacher(until_verified=2, max_samples=4)
    assert next_samples(plan, {}) == [0, 1]
    assert next_samples(plan, {0: True}) == [1]
    # A hole that a damaged part left is filled before anything new is sampled.
    assert next_samples(plan, {1: False, 2: False}) == [0, 3]
    assert samples_left(plan, {0: True}) == 3
    assert samples_left(plan, {0: True, 1: True}) == 0


def test_whatever_ends_a_run_all_that_was_verified_is_written(caplog: pytest.LogCaptureFixture) -> None:
    right = [[True]] * 20
    kept: list[Trace] = []
    with pytest.raises(EngineError, match="the machine is out of memory"):
        solve(
            teacher(), right, {}, Machine(random.Random(0), seconds=0.005, fails_after=15), append=kept.extend
        )
    assert 0 < len(kept) < 15
    calls = []

    def full(traces: Sequence[Trace]) -> None:
        calls.append(len(traces))
        raise StoreError("no space left on device")

    with pytest.raises(StoreError, match="no space left on device"):
        solve(teacher(), right, {}, Machine(random.Random(0)), append=full)
    assert calls == [3]
    # asyncio logs exceptions that nobody has looked at, when they are collected.
    gc.collect()
    assert not caplog.records
