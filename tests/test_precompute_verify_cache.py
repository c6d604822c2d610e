"""What the judge remembers, and who gets which pair."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.verify.cache import ENTRY_CHARS, OutcomeCache
from precompute.verify.process import Outcome
from precompute.verify.queue import Job, JobQueue

MATCH = Outcome("match", "")


def test_an_outcome_is_remembered_until_newer_ones_need_its_room() -> None:
    # An entry costs 1,000 + 5 ("match") + 1 + 1 = 1,007 characters: two fit into 2,100, three do not.
    cache = OutcomeCache(budget=2_100)
    cache.put(("1", "a"), MATCH)
    cache.put(("1", "b"), MATCH)
    assert cache.used == 2 * (ENTRY_CHARS + 7)
    assert cache.get(("1", "a")) is MATCH  # asked for: now `b` is the one to go
    cache.put(("1", "c"), MATCH)
    assert [cache.get(("1", key)) for key in "abc"] == [MATCH, None, MATCH]


@pytest.mark.parametrize("reason", ["timeout", "error"])
def test_what_says_nothing_about_the_pair_is_not_remembered(reason: str) -> None:
    cache = OutcomeCache(budget=10_000)
    cache.put(("1", "a"), Outcome(reason, "the machine was busy"))
    assert len(cache) == 0


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=3000)), max_size=40))
def test_memory_stays_within_its_budget_whatever_comes(pairs: list[tuple[str, str]]) -> None:
    cache = OutcomeCache(budget=8_000)
    for pair in pairs:
        cache.put(pair, MATCH)
        assert cache.used <= 8_000
    kept = [pair for pair in dict.fromkeys(pairs) if cache.get(pair)]
    assert cache.used == sum(ENTRY_CHARS + 5 + len(gold) + len(answer) for gold, answer in kept)


def test_pairs_of_one_gold_go_to_one_worker_and_an_idle_worker_helps() -> None:
    jobs = JobQueue(2)
    for answer in "abcd":
        jobs.put(Job(("7", answer), 1.0))
    home = hash("7") % 2
    (first,), (other,) = jobs.get(home), jobs.get(1 - home)
    assert (first.pair[1], other.pair[1]) == ("a", "b")
    assert [job.pair[1] for job in jobs.drain()] == ["c", "d"]


def test_a_closed_queue_gives_out_what_waits_and_then_ends() -> None:
    jobs = JobQueue(3)
    got: list[list[Job]] = []
    waiting = threading.Thread(target=lambda: got.extend([jobs.get(2), jobs.get(2)]))
    waiting.start()
    jobs.put(Job(("7", "a"), 1.0))
    jobs.close()
    waiting.join(timeout=10)
    assert [[job.pair for job in taken] for taken in got] == [[("7", "a")], []]


def test_while_many_wait_a_worker_gets_several_and_the_last_one_by_one() -> None:
    # A quarter of what waits behind the first, 16 at most: 11 // 4 = 2, 9 // 4 = 2, 7 // 4 = 1, 6 // 4 = 1.
    jobs = JobQueue(1)
    for answer in "abcdefghijkl":
        jobs.put(Job(("7", answer), 1.0))
    assert ["".join(job.pair[1] or "" for job in jobs.get(0)) for _ in range(4)] == ["ab", "cd", "e", "f"]
