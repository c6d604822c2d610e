"""What a row of somebody's file states: a problem, and traces with the names of their teachers.

The published data sets' forms, AMPO's with a trace a teacher in each row, LUFFY's with one trace a row:

    {"prompt": [...], "reward_model": {"ground_truth": "4"}, "target_lst": [{"content": "...", "source": "r1"}]}
    {"prompt": [...], "reward_model": {"ground_truth": "4"}, "target": [{"content": "...", "role": "assistant"}]}

and plain rows, one trace each:

    {"question": "What is 2 + 2?", "answer": "4", "teacher": "r1", "text": "It is \\boxed{4}"}
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precompute.problems.data_rows import (
    SUFFIXES,
    Leaf,
    Row,
    cell_of,
    data_rows,
    find_column,
    has_cell,
    short,
)
from precompute.problems.problem_files import ANSWER_COLUMNS, QUESTION_COLUMNS, problem_of_row
from store.errors import ProblemsError
from store.records import Problem

TEXT_COLUMNS = ("target_lst", "target", "text", "response", "completion", "output")
TEACHER_COLUMNS = ("teacher", "extra_info.teacher")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportColumns:
    """Which columns hold what; None: the first of the known ones that the file has."""

    question: str | None = None
    answer: str | None = None
    text: str | None = None
    teacher: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherNames:
    """From what the file calls a teacher to the name in the store."""

    default: str | None = None
    """For traces that name no teacher."""
    prefix: str = ""
    """Put before every name that is not renamed."""
    renames: Mapping[str, str]
    """The file's name -> the store's."""

    def of(self, source: str | None) -> str:
        """The store's name. ValueError when the trace names no teacher and there is no default."""
        if source is None or not source.strip():
            if self.default is None:
                raise ValueError("the trace names no teacher; give --teacher NAME")
            source = self.default
        if source in self.renames:
            return self.renames[source]
        return self.prefix + file_name(source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A trace as the file gives it, not yet judged."""

    problem: Problem
    source: str
    """The teacher as the file calls it; where it does not, the name that it gets."""
    teacher: str
    """Its name in the store."""
    text: str
    """Empty where the file has none."""


class ImportForm:
    """The columns of one import, settled by the first row of the first file."""

    def __init__(self, files: Sequence[Path], columns: ImportColumns, names: TeacherNames) -> None:
        self.files = tuple(files)
        self._names = names
        file, row = self._first_row()
        self._question = find_column(file, row, columns.question, QUESTION_COLUMNS, "--question-column")
        self._answer = find_column(file, row, columns.answer, ANSWER_COLUMNS, "--answer-column")
        self.text = find_column(file, row, columns.text, TEXT_COLUMNS, "--text-column")
        known = (columns.teacher,) if columns.teacher else TEACHER_COLUMNS
        self._teacher = next((name for name in known if has_cell(row, name)), None)
        if columns.teacher and self._teacher is None:
            find_column(file, row, columns.teacher, (), "--teacher-column")

    def rows(self, *, texts: bool = True) -> Iterator[tuple[Problem, list[Candidate]]]:
        """Each row's problem and traces. Without `texts` these may come empty, and Parquet is read faster.

        Raises ProblemsError that names file and row.
        """
        for file in self.files:
            for number, row in data_rows(file, skip=None if texts else self._is_text):
                try:
                    problem = problem_of_row(row, self._question, self._answer)
                    yield problem, list(self._candidates(row, problem))
                except ValueError as error:
                    raise ProblemsError(f"{file}, row {number}: {error}") from None

    def _first_row(self) -> tuple[Path, Row]:
        for file in self.files:
            for _, row in data_rows(file):
                return file, row
        raise ProblemsError(f"{self.files[0]} holds no row")

    def _is_text(self, leaf: Leaf) -> bool:
        """Whether a leaf is the long text. A plain column of texts stays: it tells how many there are."""
        return leaf[0] == self.text and len(leaf) > 1 and leaf[-1] == "content"

    def _candidates(self, row: Row, problem: Problem) -> Iterator[Candidate]:
        named = cell_of(row, self._teacher) if self._teacher and has_cell(row, self._teacher) else None
        named = named if isinstance(named, str) else None
        for source, text in _texts(cell_of(row, self.text), self.text):
            source = source or named
            teacher = self._names.of(source)
            yield Candidate(problem=problem, source=source or teacher, teacher=teacher, text=text)


def _texts(cell: Any, column: str) -> Iterator[tuple[str | None, str]]:
    """(teacher, text) of a text, of a list of texts, or of a list of {content, source, ...}."""
    if cell is None:
        return
    if isinstance(cell, str):
        yield None, cell
        return
    if not isinstance(cell, list):
        raise ValueError(f"{column} is neither a text nor a list: {short(cell)}")
    for entry in cell:
        if isinstance(entry, Mapping):
            if entry.get("role", "assistant") in ("assistant", None):
                yield entry.get("source"), _text_of(entry.get("content"), column)
        else:
            yield None, _text_of(entry, column)


def _text_of(content: Any, column: str) -> str:
    if isinstance(content, str | None):
        return content or ""
    raise ValueError(f"{column} holds something that is no text: {short(content)}")


def file_name(source: str) -> str:
    """A teacher's name that can be a file's: what cannot stand in one becomes a dash."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.strip()).lstrip("._-")
    if not name:
        raise ValueError(f"{source!r} cannot name a teacher; give --rename {source}=NAME")
    return name


def files_at(path: str | Path) -> list[Path]:
    """The data files that `path` names: itself, or those of the first kind in SUFFIXES that the
    directory holds, in order of their paths."""
    root = Path(path).absolute()
    if not root.is_dir():
        return [root]
    below = [file for file in sorted(root.rglob("*")) if not _is_hidden(file.relative_to(root))]
    # The kinds in order: a .json file beside Parquet or JSONL files describes them.
    for suffix in SUFFIXES:
        found = [file for file in below if file.suffix == suffix and file.is_file()]
        if found:
            return found
    raise ProblemsError(f"{root} holds no file that ends in {', '.join(SUFFIXES)}")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
