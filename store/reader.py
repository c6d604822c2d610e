"""The reading side of a store, for the trainer and `ampo inspect store`.

with TraceStore("traces") as store:
    store.candidates(["5f0c...", "91ab..."])      {"5f0c...": [Trace, Trace], "91ab...": []}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Self, TypedDict, Unpack

from store.errors import StoreDamagedError
from store.format.index import ROW_COLUMNS, Index, open_index
from store.format.manifest import Manifest, read_manifest
from store.format.parts import DamagedPart
from store.format.reading import PartReader, read_problems, read_teachers
from store.records import Problem, TeacherRecord, Trace

_ROWS = f"SELECT {', '.join(ROW_COLUMNS)} FROM idx.rows"

# The ids are part of the text, not a parameter: only then does DuckDB skip row groups by them.
_CANDIDATES = """
    WHERE problem IN ({problems}) AND (NOT $usable OR (is_correct AND filtered IS NULL))
      AND ($teachers::VARCHAR[] IS NULL OR list_contains($teachers::VARCHAR[], teacher))
"""

_TRACES = """
    WHERE ($any_problem OR problem = $problem::UBIGINT)
      AND ($teacher::VARCHAR IS NULL OR teacher = $teacher)
      AND ($verdict::VARCHAR IS NULL OR verdict = $verdict)
      AND (NOT $usable OR (is_correct AND filtered IS NULL)) AND (NOT $filtered OR filtered IS NOT NULL)
    ORDER BY problem, teacher, sample_index, trace LIMIT $limit
"""

_REFRESHES = 5
"""Attempts at reading parts that are being replaced."""

_ID = re.compile(r"[0-9a-f]{16}")

_CONTENTS = """
    SELECT teacher, count(*) AS traces, bit_xor(trace) AS mark FROM idx.rows
    WHERE problem IN (SELECT unnest($problems::UBIGINT[])) AND is_correct AND filtered IS NULL
      AND ($teachers::VARCHAR[] IS NULL OR list_contains($teachers::VARCHAR[], teacher))
    GROUP BY teacher ORDER BY teacher
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """Count and fingerprint of a teacher's usable traces: equal ones mean the same traces."""

    traces: int
    fingerprint: str
    """Exclusive or of all trace_ids: independent of order and parts."""


class TraceConditions(TypedDict, total=False):
    """Conditions on traces; None and False: no condition."""

    problem_id: str | None
    teacher: str | None
    verdict: str | None
    usable: bool
    """Only verified traces that are not filtered."""
    filtered: bool
    """Only filtered traces."""


class TraceStore:
    """A store opened for reading; any number of processes may, while one writes.

    It sees the parts as of its opening or last refresh, without damaged ones. One thread at a time.
    Raises StoreMissingError, StoreForeignError, StoreVersionError or StoreDamagedError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.manifest: Manifest = read_manifest(self.path)
        self.index: Index = open_index(self.path)
        self._reader = PartReader(self.path)

    @property
    def damaged(self) -> tuple[DamagedPart, ...]:
        """The parts that could not be read."""
        return self.index.damaged()

    def candidates(
        self,
        problem_ids: Sequence[str],
        *,
        teachers: Sequence[str] | None = None,
        tokens: bool = False,
        usable: bool = True,
    ) -> dict[str, list[Trace]]:
        """Returns the usable traces of each problem, [] for a problem without one.

        In order of teacher, sample_index, trace_id. `teachers`: None for all. Without `tokens` the traces
        have empty `token_ids` and `logprobs`, and are read in a third of the time. Without `usable` the
        wrong and the filtered traces are returned too.
        Raises StoreDamagedError for a part that was damaged after its indexing.
        """
        found: dict[str, list[Trace]] = {problem_id: [] for problem_id in problem_ids}
        numbers = [str(int(problem_id, 16)) for problem_id in found if _ID.fullmatch(problem_id)]
        if not numbers:
            return found
        where = _CANDIDATES.format(problems=", ".join(numbers))
        parameters = {"usable": usable, "teachers": None if teachers is None else list(teachers)}
        for trace in self._read(where, parameters, tokens=tokens):
            found[trace.problem_id].append(trace)
        return found

    def usable(
        self, problem_ids: Sequence[str], *, teachers: Sequence[str] | None = None
    ) -> dict[str, Usable]:
        """Summarizes the result of `candidates` by teacher; teachers without a trace are missing."""
        parameters = {
            "problems": [int(problem_id, 16) for problem_id in problem_ids],
            "teachers": None if teachers is None else list(teachers),
        }
        return {
            row["teacher"]: Usable(traces=row["traces"], fingerprint=f"{row['mark']:016x}")
            for row in self.index.rows(_CONTENTS, parameters)
        }

    def traces(
        self, *, limit: int | None = None, tokens: bool = False, **conditions: Unpack[TraceConditions]
    ) -> list[Trace]:
        """Returns traces of any verdict, in order of problem_id, teacher, sample_index."""
        return self._read(_TRACES, _parameters(conditions, limit), tokens=tokens)

    def count(self, **conditions: Unpack[TraceConditions]) -> int:
        """Returns the number of traces that `traces` returns; reads the index alone."""
        query = f"SELECT count(*) AS traces FROM (FROM idx.rows {_TRACES})"
        count: int = self.index.rows(query, _parameters(conditions, None))[0]["traces"]
        return count

    def _read(self, where: str, parameters: Mapping[str, object], *, tokens: bool) -> list[Trace]:
        """Returns the traces of a condition, in order of problem, teacher, sample and trace_id."""
        order = attrgetter("problem_id", "teacher", "sample_index", "trace_id")
        for _ in range(_REFRESHES):
            try:
                traces = self._reader.traces(self.index.rows(_ROWS + where, parameters), tokens=tokens)
                return sorted(traces, key=order)
            except FileNotFoundError:
                # A compaction replaced parts that this index knows.
                self.refresh()
        raise StoreDamagedError(f"the parts of {self.path} change faster than they can be read; try again")

    def pass_rates(self) -> dict[str, float]:
        """Returns problem_id -> share of verified ones among its traces; problems without one are missing."""
        query = "SELECT problem_id, avg(is_correct::INT) AS rate FROM idx.traces GROUP BY problem_id"
        return {row["problem_id"]: row["rate"] for row in self.index.rows(query)}

    def teachers(self) -> dict[str, TeacherRecord]:
        """Returns every registered teacher, by name."""
        return read_teachers(self.path)

    def problems(self) -> list[Problem]:
        """Returns every problem, in order of arrival."""
        return read_problems(self.path)

    def refresh(self) -> None:
        """Brings the view of the store up to the present parts."""
        index = open_index(self.path)
        self.close()
        self.index = index

    def close(self) -> None:
        """Closes every file."""
        self.index.close()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parameters(conditions: TraceConditions, limit: int | None) -> dict[str, object]:
    """Returns the parameters of `_TRACES`; no problem has the number of an id that is not one."""
    problem_id = conditions.get("problem_id")
    number = int(problem_id, 16) if problem_id is not None and _ID.fullmatch(problem_id) else None
    return {
        "any_problem": problem_id is None,
        "problem": number,
        "teacher": conditions.get("teacher"),
        "verdict": conditions.get("verdict"),
        "usable": conditions.get("usable", False),
        "filtered": conditions.get("filtered", False),
        "limit": limit,
    }
