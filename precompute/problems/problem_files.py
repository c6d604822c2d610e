"""Reads problems from Parquet or JSONL and recognises repeated ones by content (DESIGN 3).

The built-in forms of a row:

    {"question": "What is 2 + 2?", "answer": "4"}                           plain
    {"prompt": [{"role": "system", "content": "..."},                       chat (verl)
                {"role": "user", "content": "What is 2 + 2?"}],
     "reward_model": {"ground_truth": "4"}, "data_source": "aime"}

To add a form, write a ProblemForm and enter it in PROBLEM_FORMS; or name your own function in the config,
`[problems] form = "forms.py:gsm8k"`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from precompute.config import ProblemsConfig
from precompute.config_file import short
from precompute.problems.data_rows import Row, cell_of, data_rows, find_column, gold_of, turns_of
from precompute.verify.verifier import Verifier
from store.errors import ProblemsError, prefixed
from store.records import Problem
from store.registry import lookup

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "gold", "reward_model.ground_truth")
SOURCE_COLUMNS = ("data_source", "source")
METADATA_COLUMNS = ("metadata", "extra_info")
ANY_FORM = "any"
"""The form of each row is the first of PROBLEM_FORMS that knows it."""


class Columns(NamedTuple):
    """Columns of a file, named from the outside in, e.g. `reward_model.ground_truth`; empty: not found."""

    question: str
    answer: str


ProblemForm = Callable[[Row, Columns], Problem | None]
"""Returns the problem that a row states; None when the row has another form, ValueError when it is wrong."""


def plain(row: Row, columns: Columns) -> Problem | None:
    """Reads a row whose question is a text."""
    question = cell_of(row, columns.question)
    if not isinstance(question, str):
        return None
    return Problem(question=_filled(question, columns.question), answer=_answer(row, columns))


def chat(row: Row, columns: Columns) -> Problem | None:
    """Reads a row whose question is a list of messages: the last user turn, and the system turn."""
    cell = cell_of(row, columns.question)
    if isinstance(cell, str):
        return None
    turns = {turn.role: turn.text for turn in turns_of(cell, columns.question)}
    if "user" not in turns:
        raise ValueError(f"{columns.question} has no message of the role 'user': {short(cell)}")
    return Problem(
        question=_filled(turns["user"], f"{columns.question}: user"),
        answer=_answer(row, columns),
        system_prompt=turns.get("system") or None,
    )


PROBLEM_FORMS: Mapping[str, ProblemForm] = {"plain": plain, "chat": chat}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSet:
    """The problems of a file."""

    problems: tuple[Problem, ...]
    """Unique by content, in the file's order; of equal ones the first."""
    rows: int
    """Rows of the file."""
    duplicates: int
    """Rows that repeat an earlier one: rows - len(problems)."""


def load_problems(
    path: str | Path,
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
    form: str = ANY_FORM,
) -> ProblemSet:
    """Reads a .parquet file, or a .jsonl, .ndjson or .json file with an object a line.

    A column is named from the outside in, `reward_model.ground_truth`; None takes the first of
    QUESTION_COLUMNS and ANSWER_COLUMNS that the file has. Raises ProblemsError.
    """
    file = Path(path).absolute()
    reader = ProblemReader(question_column, answer_column, form=form)
    unique: dict[str, Problem] = {}
    repeats: Counter[str] = Counter()
    for number, row in data_rows(file, kind="problem file"):
        problem = reader.problem(file, number, row)
        unique.setdefault(problem.problem_id, problem)
        repeats[problem.problem_id] += 1
    if not unique:
        raise ProblemsError(f"{file} holds no problem")
    problems = tuple(replace(problem, repeats=repeats[each]) for each, problem in unique.items())
    rows = repeats.total()
    return ProblemSet(problems=problems, rows=rows, duplicates=rows - len(unique))


def configured_problems(config: ProblemsConfig, which: Literal["train", "eval"]) -> ProblemSet:
    """Reads the file of `problems.train` or `problems.eval`. Raises ProblemsError that names the key."""
    with prefixed(f"problems.{which}", ProblemsError):
        return load_problems(
            getattr(config, which),
            question_column=config.question_column,
            answer_column=config.answer_column,
            form=config.form,
        )


class ProblemReader:
    """Reads the problems of rows; the first row settles the columns."""

    def __init__(
        self,
        question_column: str | None,
        answer_column: str | None,
        *,
        form: str = ANY_FORM,
        options: tuple[str, str] = ("problems.question_column", "problems.answer_column"),
    ) -> None:
        """`options` choose the columns, for errors. Raises ConfigError for an unknown form."""
        built_in = form == ANY_FORM or form in PROBLEM_FORMS
        self._forms = (
            PROBLEM_FORMS.values() if form == ANY_FORM else [lookup(PROBLEM_FORMS, form, key="problems.form")]
        )
        names = (QUESTION_COLUMNS, ANSWER_COLUMNS) if built_in else ((), ())
        self._wanted = tuple(zip((question_column, answer_column), names, options, strict=True))
        self._columns: Columns | None = None

    def problem(self, file: Path, number: int, row: Row) -> Problem:
        """Returns the problem that a row states. Raises ProblemsError that names file and row."""
        if self._columns is None:
            self._columns = Columns(
                *(find_column(file, row, *each) if each[0] or each[1] else "" for each in self._wanted)
            )
        try:
            problem = self._formed(row, self._columns)
        except KeyError as error:
            raise ProblemsError(f"{file}, row {number}: the column {error} is missing") from None
        except ValueError as error:
            raise ProblemsError(f"{file}, row {number}: {error}") from None
        sources = (row.get(name) for name in SOURCE_COLUMNS)
        return replace(
            problem,
            source=next((each for each in sources if isinstance(each, str)), problem.source),
            verifier=problem.verifier or row.get("verifier") or "",
            metadata=problem.metadata or metadata_of(row),
        )

    def _formed(self, row: Row, columns: Columns) -> Problem:
        for form in self._forms:
            if (problem := form(row, columns)) is not None:
                return problem
        raise ValueError(f"problems.form does not fit this row: {short(row)}")


def metadata_of(row: Row) -> dict[str, Any]:
    """Returns the facts for the row's verifier, in JSON's types: its `metadata` or verl's `extra_info`, an
    object or JSON text."""
    for name in METADATA_COLUMNS:
        cell = row.get(name)
        if isinstance(cell, str) and cell.strip().startswith("{"):
            cell = json.loads(cell)
        if isinstance(cell, Mapping):
            facts = json.loads(json.dumps(cell, default=str))
            # Parquet gives every row the keys of all.
            return {key: value for key, value in facts.items() if value is not None}
    return {}


def split_by_gold(
    problems: Sequence[Problem], verifier: Verifier
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Returns (usable, unparseable): a problem whose gold answer cannot be parsed never earns a reward."""
    pairs = list(zip(problems, verifier.gold_errors(problems), strict=True))
    return tuple(p for p, error in pairs if error is None), tuple(
        p for p, error in pairs if error is not None
    )


def _answer(row: Row, columns: Columns) -> str:
    return _filled(gold_of(cell_of(row, columns.answer), columns.answer), columns.answer)


def _filled(text: str, column: str) -> str:
    if not text.strip():
        raise ValueError(f"{column} holds no text: {text!r}")
    return text
