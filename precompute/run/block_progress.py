"""How far blocks are that are solved elsewhere: told by their workers, summed up for whoever watches.

workers --latest progress of a block, messages--> tally <--take-- watch --sum--> reporter
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from precompute.run.block_work import REPORT_SECONDS
from precompute.run.draws import Done, samples_left
from precompute.run.progress import Reporter, TeacherProgress
from precompute.run.solve import Job
from store.records import Problem

Told = tuple[dict[int, TeacherProgress], list[str]]
"""(block -> how far it is, messages that are new)"""

Take = Callable[[], Told]


class Tally:
    """An actor that gathers what the workers tell until the driver asks."""

    def __init__(self) -> None:
        self._latest: dict[int, TeacherProgress] = {}
        self._messages: list[str] = []
        self._tries: Counter[int] = Counter()

    def begin(self, block: int) -> int:
        """How often the block has been begun by now: more than once if workers died over it."""
        self._tries[block] += 1
        if self._tries[block] > 1:
            self.message(f"the worker of block {block} died; another goes on with it")
        return self._tries[block]

    def progress(self, block: int, progress: TeacherProgress) -> None:
        """How far a block is: the latest of it counts."""
        self._latest[block] = progress

    def message(self, text: str) -> None:
        """Kept until it is taken."""
        self._messages.append(text)

    def take(self) -> Told:
        """Every block's latest, and the messages since the last call."""
        messages, self._messages = self._messages, []
        return self._latest, messages


class TallyTell:
    """A worker's side of it: tells and does not wait."""

    def __init__(self, tally: Any) -> None:
        self._tally = tally

    def progress(self, block: int, progress: TeacherProgress) -> None:
        """How far a block is."""
        self._tally.progress.remote(block, progress)

    def message(self, text: str) -> None:
        """Something worth a line."""
        self._tally.message.remote(text)


class Watch:
    """The driver's view of one teacher: the sum over its blocks, for the reporter."""

    def __init__(self, job: Job, problems: Sequence[Problem], done: Done, reporter: Reporter) -> None:
        self._job = job
        self._there = {problem.problem_id: done.get(problem.problem_id, {}) for problem in problems}
        self._reporter = reporter
        self._blocks: list[list[str]] = []
        self._latest: dict[int, TeacherProgress] = {}
        self._started = time.monotonic()

    def plan(self, blocks: list[list[str]]) -> None:
        """What is to be done."""
        self._blocks = blocks

    def progress(self) -> TeacherProgress:
        """Of blocks that nobody has begun, what was there before."""
        begun = {problem_id for number in self._latest for problem_id in self._blocks[number]}
        rest = [samples for problem_id, samples in self._there.items() if problem_id not in begun]
        there = sum(map(len, rest))
        latest = self._latest.values()
        return TeacherProgress(
            teacher=self._job.name,
            done=there + sum(each.done for each in latest),
            total=there
            + sum(samples_left(self._job.config, samples) for samples in rest)
            + sum(each.total for each in latest),
            verified=sum(each.verified for each in latest),
            filtered=sum(each.filtered for each in latest),
            judged=sum(each.judged for each in latest),
            tokens=sum(each.tokens for each in latest),
            seconds=time.monotonic() - self._started,
        )

    @contextmanager
    def following(self, take: Take) -> Iterator[None]:
        """A thread asks the tally now and then while the block of code runs."""
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(take, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _follow(self, take: Take, stop: threading.Event) -> None:
        ended = False
        while not ended:
            ended = stop.wait(REPORT_SECONDS)
            latest, messages = take()
            for message in messages:
                self._reporter.message(message)
            if latest:
                self._latest = latest
                self._reporter.progress(self.progress())
