"""Reads rows of somebody's file: a problem, and traces with the names of their teachers.

The forms of the published data sets, AMPO's with several traces a row, LUFFY's with one:

    {"prompt": [...], "reward_model": {"ground_truth": "4"}, "target_lst": [{"content": "...", "source": "r1"}]}
    {"prompt": [...], "reward_model": {"ground_truth": "4"}, "target": [{"content": "...", "role": "assistant"}]}

and plain rows, one trace each:

    {"question": "What is 2 + 2?", "answer": "4", "teacher": "r1", "text": "It is \\boxed{4}"}
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from precompute.config import ProblemColumns
from precompute.engines.openai_answers import behind_thought, whole_text
from precompute.problems.data_files import Row, data_rows
from precompute.problems.data_rows import Turn, cell_of, find_column, has_cell, thought_of, turns_of
from precompute.problems.forms import RESPONSE_COLUMNS
from precompute.problems.problem_files import LeftOut, ProblemReader
from store.errors import ProblemsError
from store.records import Problem

TEXT_COLUMNS = (
    *("target_lst", "target", "text", "response", "completion", "output"),
    *RESPONSE_COLUMNS,
)
TEACHER_COLUMNS = ("teacher", "extra_info.teacher")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportColumns:
    """Names of the columns; None: the first of the known ones that the file has."""

    question: str | None = None
    answer: str | None = None
    text: str | None = None
    teacher: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherNames:
    """Maps the file's name of a teacher to the name in the store."""

    default: str | None = None
    """For traces that name no teacher."""
    renames: Mapping[str, str]
    """The file's name -> the store's."""

    def stored(self, source: str | None) -> str:
        """Returns the store's name. ValueError when the trace names no teacher and there is no default."""
        if source is None or not source.strip():
            if self.default is None:
                raise ValueError("the trace names no teacher; give --teacher NAME")
            source = self.default
        return self.renames.get(source) or file_name(source)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignTrace:
    """A trace as the file gives it, not yet verified."""

    problem: Problem
    source: str
    """The file's name of the teacher; where it has none, the name in the store."""
    teacher: str
    """Its name in the store."""
    text: str
    """Empty where the file has none."""


class ImportForm:
    """The columns of one import, settled by the first row that states a problem."""

    def __init__(self, files: Sequence[Path], columns: ImportColumns, names: TeacherNames) -> None:
        """Raises UserErrors where no row states a problem or a column is missing."""
        self.files = tuple(files)
        self._names = names
        named = ProblemColumns(question_column=columns.question, answer_column=columns.answer)
        self._problems = ProblemReader(named, options=("--question-column", "--answer-column"))
        left_out = LeftOut()
        file, _, row, _ = next(self._stated(left_out), (None, 0, {}, None))
        if file is None:
            first = f"problem: {left_out.lines[0]}" if left_out.counts else "row"
            raise ProblemsError(f"{self.files[0]} holds no {first}")
        self.text = find_column(file, row, columns.text, TEXT_COLUMNS, "--text-column")
        known = (columns.teacher,) if columns.teacher else TEACHER_COLUMNS
        self._teacher = next((name for name in known if has_cell(row, name)), None)
        if columns.teacher and self._teacher is None:
            find_column(file, row, columns.teacher, (), "--teacher-column")

    def rows(self, left_out: LeftOut) -> Iterator[tuple[Problem, list[ForeignTrace]]]:
        """Yields each row's problem and traces; rows that cannot be read go to `left_out`."""
        for file, number, row, problem in self._stated(left_out):
            try:
                traces = list(self._traces(row, problem))
            except ValueError as error:
                left_out.add_row(file, number, str(error))
            else:
                yield problem, traces

    def _stated(self, left_out: LeftOut) -> Iterator[tuple[Path, int, Row, Problem]]:
        """Yields the rows that state a problem, each with its file, number and problem."""
        for file in self.files:
            bad = partial(left_out.add_row, file)
            for number, row in data_rows(file, on_bad=bad):
                try:
                    problem = self._problems.read(file, row)
                except ValueError as error:
                    bad(number, str(error))
                else:
                    yield file, number, row, problem

    def _traces(self, row: Row, problem: Problem) -> Iterator[ForeignTrace]:
        named = cell_of(row, self._teacher) if self._teacher and has_cell(row, self._teacher) else None
        given = turns_of(cell_of(row, self.text), self.text)
        # In a conversation, the answers to the last question.
        start = 1 + max((index for index, turn in enumerate(given) if turn.role == "user"), default=-1)
        for turn in given[start:]:
            if turn.role in ("assistant", None):
                source = _source_of(turn.source) or _source_of(named)
                teacher = self._names.stored(source)
                text = self._with_reasoning(turn, row)
                yield ForeignTrace(problem=problem, source=source or teacher, teacher=teacher, text=text)

    @staticmethod
    def _with_reasoning(turn: Turn, row: Row) -> str:
        """Returns the text behind the reasoning that the turn has, or beside a plain text the row."""
        thought = turn.reasoning or (thought_of(row) if turn.role is None else "")
        return behind_thought(turn.text, thought) if thought and turn.text.strip() else turn.text


def _source_of(cell: object) -> str | None:
    """Returns a teacher's name, which may be a number; None for anything else."""
    return whole_text(str(cell)) if isinstance(cell, str | int | float) else None


def file_name(source: str) -> str:
    """Returns a teacher's name that can be a file's: other characters become dashes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.strip()).lstrip("._-")
    if not name:
        raise ValueError(f"{source!r} cannot name a teacher; give --rename {source}=NAME")
    return name
