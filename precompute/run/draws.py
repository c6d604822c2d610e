"""Which samples of a problem to draw next, and the feed that hands them to an engine one by one.

Pure arithmetic over what is there: no clock, no engine, no store.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

from precompute.config import TeacherConfig
from store.records import content_hash

Done = dict[str, dict[int, bool]]
"""problem_id -> sample_index -> may be used: verified, and no filter holds it back"""

Draw = tuple[str, int]
"""(problem_id, sample_index)"""


def next_samples(
    teacher: TeacherConfig, done: Mapping[int, bool], drawing: Collection[int] = ()
) -> list[int]:
    """The sample indexes to draw now, given those that are judged (sample_index -> may be used) and those
    that are being drawn; [] when nothing can be asked for now.

    With `until_verified = m`: as many as usable traces are still missing, were all that are being drawn
    usable; the lowest free indexes first. So none is drawn that could turn out not to be needed, and a run
    that was killed anywhere ends with the same samples as one that was not.
    """
    free = [index for index in range(teacher.sample_budget) if index not in done and index not in drawing]
    if teacher.until_verified is None:
        return free
    return free[: max(teacher.until_verified - sum(done.values()) - len(drawing), 0)]


def samples_left(teacher: TeacherConfig, done: Mapping[int, bool]) -> int:
    """How many samples the problem may still get: with `until_verified` an upper bound."""
    if not next_samples(teacher, done):
        return 0
    return sum(index not in done for index in range(teacher.sample_budget))


def sample_seed(problem_id: str, teacher: str, sample_index: int) -> int:
    """Below 2**31 and its own for each (problem, teacher, sample): a shared seed gives n equal samples."""
    return int(content_hash(problem_id, teacher, sample_index), 16) % 2**31


class DrawFeed:
    """An iterator over what to draw now; None: nothing before a verdict comes; its end: nothing more.

    A problem that needs another try goes to the front: the tries of the hardest follow one another, and begun
    late they would keep an engine waiting that has nothing else to do.
    """

    def __init__(self, teacher: TeacherConfig, problem_ids: Sequence[str], done: Done) -> None:
        self._teacher = teacher
        self._done = {problem_id: dict(done.get(problem_id, {})) for problem_id in problem_ids}
        self._drawing: dict[str, set[int]] = {}
        self._ready = deque(problem_ids)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Draw | None]:
        return self

    def __next__(self) -> Draw | None:
        with self._lock:
            while self._ready:
                problem_id = self._ready[0]
                drawing = self._drawing.get(problem_id, set())
                if indexes := next_samples(self._teacher, self._done[problem_id], drawing):
                    self._drawing[problem_id] = drawing | {indexes[0]}
                    return problem_id, indexes[0]
                self._ready.popleft()
            if self._drawing:
                return None
            raise StopIteration

    def judged(self, problem_id: str, sample_index: int, usable: bool) -> None:
        """What was handed out is judged. From any thread."""
        with self._lock:
            self._done[problem_id][sample_index] = usable
            drawing = self._drawing.pop(problem_id) - {sample_index}
            if drawing:
                self._drawing[problem_id] = drawing
            if next_samples(self._teacher, self._done[problem_id], drawing):
                self._ready.appendleft(problem_id)
