"""Which samples of a problem to draw next: pure arithmetic over what is there."""

from __future__ import annotations

from collections.abc import Mapping

from precompute.config import TeacherConfig
from store.records import content_hash


def next_samples(teacher: TeacherConfig, done: Mapping[int, bool]) -> list[int]:
    """The sample indexes to draw now, given those that are there (sample_index -> is_correct); [] when done.

    With `until_verified = m`: as many as verified traces are still missing, the lowest free indexes first.
    All of them are needed even if each turns out right, so that a run that was killed between two waves
    or within one ends with the same samples as one that was not.
    """
    free = [index for index in range(teacher.sample_budget) if index not in done]
    if teacher.until_verified is None:
        return free
    return free[: max(teacher.until_verified - sum(done.values()), 0)]


def samples_left(teacher: TeacherConfig, done: Mapping[int, bool]) -> int:
    """How many samples the problem may still get: with `until_verified` an upper bound."""
    if not next_samples(teacher, done):
        return 0
    return sum(index not in done for index in range(teacher.sample_budget))


def sample_seed(problem_id: str, teacher: str, sample_index: int) -> int:
    """Below 2**31 and its own for each (problem, teacher, sample): a shared seed gives n equal samples."""
    return int(content_hash(problem_id, teacher, sample_index), 16) % 2**31
