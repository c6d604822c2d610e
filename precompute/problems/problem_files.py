"""Reads problems from Parquet or JSONL and recognises by content those that stand twice (DESIGN 3).

Two forms, told apart by what the question cell holds:

    {"question": "What is 2 + 2?", "answer": "4"}                           a text
    {"prompt": [{"role": "system", "content": "..."},                       messages (verl)
                {"role": "user", "content": "What is 2 + 2?"}],
     "reward_model": {"ground_truth": "4"}, "data_source": "aime"}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from precompute.problems.data_rows import cell_of, data_rows, find_column, short
from precompute.verify.verifier import Verifier
from store.errors import ProblemsError
from store.records import Problem

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "gold", "reward_model.ground_truth")
SOURCE_COLUMNS = ("data_source", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSet:
    """The problems of a file."""

    problems: tuple[Problem, ...]
    """Unique by content, in the file's order; of equal ones the first."""
    rows: int
    """Rows of the file."""
    duplicates: int
    """Rows that repeat an earlier one: rows - len(problems)."""


@contextmanager
def of_key(key: str) -> Iterator[None]:
    """A ProblemsError of the block begins with the config's key that named the file."""
    try:
        yield
    except ProblemsError as error:
        raise ProblemsError(f"{key}: {error}") from None


def load_problems(
    path: str | Path, *, question_column: str | None = None, answer_column: str | None = None
) -> ProblemSet:
    """The problems of a .parquet file, or of a .jsonl, .ndjson or .json file with an object a line.

    A column is named from the outside in, `reward_model.ground_truth`; None takes the first of
    QUESTION_COLUMNS and ANSWER_COLUMNS that the file has. Raises ProblemsError.
    """
    file = Path(path).absolute()
    unique: dict[str, Problem] = {}
    stated: Counter[str] = Counter()
    rows = 0
    question = answer = ""
    for number, row in data_rows(file, kind="problem file"):
        if not rows:
            question = find_column(file, row, question_column, QUESTION_COLUMNS, "problems.question_column")
            answer = find_column(file, row, answer_column, ANSWER_COLUMNS, "problems.answer_column")
        rows += 1
        try:
            problem = problem_of_row(row, question, answer)
        except ValueError as error:
            raise ProblemsError(f"{file}, row {number}: {error}") from None
        unique.setdefault(problem.problem_id, problem)
        stated[problem.problem_id] += 1
    if not rows:
        raise ProblemsError(f"{file} holds no problem")
    problems = tuple(replace(problem, repeats=stated[each]) for each, problem in unique.items())
    return ProblemSet(problems=problems, rows=rows, duplicates=rows - len(unique))


def split_by_gold(
    problems: Sequence[Problem], verifier: Verifier
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(usable, unparseable): a problem whose gold answer cannot be parsed could never earn a reward."""
    parses = verifier.check_golds(problem.answer for problem in problems)
    pairs = list(zip(problems, parses, strict=True))
    return tuple(p for p, fine in pairs if fine), tuple(p for p, fine in pairs if not fine)


def problem_of_row(row: Mapping[str, Any], question_column: str, answer_column: str) -> Problem:
    """The problem that a row states. ValueError when a column is missing or holds no text."""
    system_prompt, question = _question(cell_of(row, question_column), question_column)
    sources = (row.get(name) for name in SOURCE_COLUMNS)
    return Problem(
        question=question,
        answer=_answer(cell_of(row, answer_column), answer_column),
        source=next((source for source in sources if isinstance(source, str)), ""),
        system_prompt=system_prompt,
    )


def _question(cell: Any, column: str) -> tuple[str | None, str]:
    """(system turn, question) of a text or of messages."""
    if isinstance(cell, str):
        return None, _text(cell, column)
    if not isinstance(cell, Sequence) or not all(isinstance(message, Mapping) for message in cell):
        raise ValueError(f"{column} is neither a text nor a list of messages: {short(cell)}")
    turns = {str(message.get("role")): message.get("content") for message in cell}
    if "user" not in turns:
        raise ValueError(f"{column} has no message of the role 'user': {short(cell)}")
    system = turns.get("system")
    return (_text(system, f"{column}: system") if system else None), _text(turns["user"], f"{column}: user")


def _answer(cell: Any, column: str) -> str:
    if isinstance(cell, list) and len(cell) == 1:
        return _answer(cell[0], column)
    if isinstance(cell, int | float | Decimal) and not isinstance(cell, bool) and math.isfinite(cell):
        return str(cell)
    return _text(cell, column)


def _text(cell: Any, column: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        raise ValueError(f"{column} holds no text: {short(cell)}")
    return cell
