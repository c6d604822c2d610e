"""What is drawn next: never more than may be needed, and the same samples however a run is cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from precompute.config import TeacherConfig
from precompute.run.draws import Done, Draw, DrawFeed, next_samples, samples_left

RIGHT = st.lists(st.sampled_from(list(itertools.product([False, True], repeat=6))), min_size=1, max_size=4)
SPEEDS = st.integers(0, 10**6).map(random.Random)


def teacher(**plan: int | None) -> TeacherConfig:
    return TeacherConfig.model_validate({"name": "ada", "model": "m", **plan})


def draw_all(
    plan: TeacherConfig, right: Sequence[Sequence[bool]], done: Done, clock: random.Random
) -> list[tuple[str, int, bool]]:
    """The samples in the order in which they were judged, by an engine and a verifier of any speed."""
    ids = [str(number) for number in range(len(right))]
    feed = DrawFeed(plan, ids, done)
    running: list[Draw] = []
    journal = []
    ended = False
    while running or not ended:
        if not ended and clock.random() < 0.7:
            try:
                draw = next(feed)
            except StopIteration:
                ended = True
                continue
            if draw is not None:
                running.append(draw)
            else:
                assert running, "a wait for nothing"
        elif running:
            problem_id, index = running.pop(clock.randrange(len(running)))
            usable = right[int(problem_id)][index]
            journal.append((problem_id, index, usable))
            feed.judged(problem_id, index, usable)
    return journal


def as_done(journal: list[tuple[str, int, bool]]) -> Done:
    done: Done = {}
    for problem_id, index, usable in journal:
        assert index not in done.setdefault(problem_id, {}), "drawn twice"
        done[problem_id][index] = usable
    return done


def needed(right: Sequence[bool], wanted: int, budget: int) -> dict[int, bool]:
    """The fewest first samples with `wanted` usable ones among them, or all that may be drawn."""
    samples: dict[int, bool] = {}
    for index in range(budget):
        if sum(samples.values()) == wanted:
            break
        samples[index] = right[index]
    return samples


@given(st.integers(1, 4), st.integers(1, 6), RIGHT, SPEEDS)
def test_only_what_is_needed_is_drawn_whatever_comes_back_first(
    wanted: int, budget: int, right: Sequence[Sequence[bool]], clock: random.Random
) -> None:
    plan = teacher(until_verified=wanted, max_samples=budget)
    done = as_done(draw_all(plan, right, {}, clock))
    assert done == {str(p): needed(answers, wanted, budget) for p, answers in enumerate(right)}


@given(st.integers(1, 4), st.integers(1, 6), RIGHT, SPEEDS, st.data())
def test_a_run_that_is_cut_anywhere_ends_with_the_same_samples(
    wanted: int, budget: int, right: Sequence[Sequence[bool]], clock: random.Random, data: st.DataObject
) -> None:
    plan = teacher(until_verified=wanted, max_samples=budget)
    journal = draw_all(plan, right, {}, clock)
    # Parts are written in the order of judging: a kill loses the end of it.
    kept = journal[: data.draw(st.integers(0, len(journal)))]
    rest = draw_all(plan, right, as_done(kept), clock)
    assert as_done(kept + rest) == as_done(journal)


@given(st.integers(1, 6), RIGHT, SPEEDS)
def test_a_fixed_number_of_samples_is_drawn_whatever_is_right(
    samples: int, right: Sequence[Sequence[bool]], clock: random.Random
) -> None:
    done = as_done(draw_all(teacher(samples=samples), right, {}, clock))
    assert {problem: sorted(found) for problem, found in done.items()} == {
        str(problem): list(range(samples)) for problem in range(len(right))
    }


def test_a_feed_step_by_step() -> None:
    # Two usable ones are wanted: the first two tries may both be needed, the third is not yet known to be.
    feed = DrawFeed(teacher(until_verified=2, max_samples=3), ["a", "b"], {})
    assert [next(feed) for _ in range(5)] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), None]
    feed.judged("a", 0, True)
    assert next(feed) is None
    feed.judged("b", 1, False)
    feed.judged("a", 1, False)
    # Who needs another try comes first, the last one to ask before the others.
    assert [next(feed) for _ in range(3)] == [("a", 2), ("b", 2), None]
    for problem_id, index in (("a", 2), ("b", 0), ("b", 2)):
        feed.judged(problem_id, index, True)
    assert list(feed) == []


def test_tries_that_are_being_drawn_count_as_if_they_were_usable() -> None:
    plan = teacher(until_verified=2, max_samples=4)
    assert next_samples(plan, {}) == [0, 1]
    assert next_samples(plan, {}, {0}) == [1]
    assert next_samples(plan, {0: False}, {1}) == [2]
    assert next_samples(plan, {0: True, 2: False}, {1}) == []
    # A hole that a damaged part left is filled before anything new is drawn.
    assert next_samples(plan, {1: False, 2: False}) == [0, 3]
    assert samples_left(plan, {0: True}) == 3
    assert samples_left(plan, {0: True, 1: True}) == 0
