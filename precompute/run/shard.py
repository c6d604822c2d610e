"""Shards: disjoint parts of the problems for processes on any machines that share a store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from store.errors import ConfigError
from store.records import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One of `count` shards, e.g. the third of 16.

    A problem's shard depends on its content alone, not on the file around it: shards never overlap, and a
    shard that goes on finds its own problems again.
    """

    number: int
    """1 .. count"""
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the shard of a text such as `3/16`. ConfigError for anything else."""
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ConfigError(
                f"--shard {text!r}: write i/n, the i-th of n shards from 1/n to n/n, e.g. --shard 3/16"
            )
        return cls(number=number, count=count)

    @property
    def name(self) -> str:
        """Name of its writer in the store."""
        return f"{self.number}-of-{self.count}"

    def holds(self, problem_id: str) -> bool:
        """Returns True for exactly one of the `count` shards."""
        return int(problem_id, 16) % self.count == self.number - 1

    def of(self, problems: Sequence[Problem]) -> tuple[Problem, ...]:
        """Returns its problems among these, in their order."""
        return tuple(problem for problem in problems if self.holds(problem.problem_id))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
