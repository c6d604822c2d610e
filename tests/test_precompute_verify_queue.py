"""Which pairs a worker gets, and how many at once."""

from __future__ import annotations

from precompute.verify.queue import TOGETHER, TOGETHER_CHARS, Job, JobQueue


def queue_of(count: int, answer: str = "5") -> JobQueue:
    queue = JobQueue(1)
    for number in range(count):
        queue.put(Job((f"{number:03}", answer), 1.0))
    return queue


def golds(jobs: list[Job]) -> list[str]:
    return [job.pair[0] for job in jobs]


def test_while_many_wait_a_worker_gets_several_and_the_last_ones_alone() -> None:
    queue = queue_of(16)
    # A quarter of those that are left after the first: 15 // 4 = 3, then 12 // 4 = 3, 9 // 4 = 2, ...
    assert golds(queue.get(0)) == ["000", "001", "002"]
    assert golds(queue.get(0)) == ["003", "004", "005"]
    assert golds(queue.get(0)) == ["006", "007"]
    assert [len(queue.get(0)) for _ in range(8)] == [1] * 8
    queue.close()
    assert queue.get(0) == []


def test_never_more_than_a_pipe_holds() -> None:
    assert len(queue_of(200).get(0)) == TOGETHER
    # 3 characters of the gold and 297 of the answer: three behind the first fit into 1,000.
    assert TOGETHER_CHARS == 1_000
    assert len(queue_of(200, "x" * 297).get(0)) == 4
    assert len(queue_of(200, "x" * 9_000).get(0)) == 1


def test_the_same_gold_goes_to_the_same_worker_and_the_idle_help() -> None:
    queue = JobQueue(2)
    jobs = [Job(("1/2", str(number)), 1.0) for number in range(3)]
    for job in jobs:
        queue.put(job)
    home = hash("1/2") % 2
    assert queue.get(home) == [jobs[0]]
    assert queue.get(1 - home) == [jobs[1]]
    assert queue.get(home) == [jobs[2]]
