"""Reads problems from Parquet or JSONL and recognises by content those that stand twice (DESIGN 3).

Two forms, told apart by what the question cell holds:

    {"question": "What is 2 + 2?", "answer": "4"}                           a text
    {"prompt": [{"role": "system", "content": "..."},                       messages (verl)
                {"role": "user", "content": "What is 2 + 2?"}],
     "reward_model": {"ground_truth": "4"}, "data_source": "aime"}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from precompute.verify import Verifier
from store.errors import ProblemsError
from store.records import Problem

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "gold", "reward_model.ground_truth")
SOURCE_COLUMNS = ("data_source", "source")
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")


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
    path: str | Path, *, question_column: str | None = None, answer_column: str | None = None
) -> ProblemSet:
    """The problems of a .parquet file, or of a .jsonl, .ndjson or .json file with an object a line.

    A column is named from the outside in, `reward_model.ground_truth`; None takes the first of
    QUESTION_COLUMNS and ANSWER_COLUMNS that the file has. Raises ProblemsError.
    """
    file = Path(path).absolute()
    unique: dict[str, Problem] = {}
    rows = 0
    question = answer = ""
    for number, row in _rows(file):
        if not rows:
            question = _column(file, row, question_column, QUESTION_COLUMNS, "question_column")
            answer = _column(file, row, answer_column, ANSWER_COLUMNS, "answer_column")
        rows += 1
        try:
            problem = _problem(row, question, answer)
        except ValueError as error:
            raise ProblemsError(f"{file}, row {number}: {error}") from None
        unique.setdefault(problem.problem_id, problem)
    if not rows:
        raise ProblemsError(f"{file} holds no problem")
    return ProblemSet(problems=tuple(unique.values()), rows=rows, duplicates=rows - len(unique))


def split_by_gold(
    problems: Sequence[Problem], verifier: Verifier
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(usable, unparseable): a problem whose gold answer cannot be parsed could never earn a reward."""
    parses = verifier.check_golds(problem.answer for problem in problems)
    pairs = list(zip(problems, parses, strict=True))
    return tuple(p for p, fine in pairs if fine), tuple(p for p, fine in pairs if not fine)


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(row number from 1, row); for text files the number is the line's."""
    if file.suffix not in SUFFIXES:
        raise ProblemsError(f"{file} ends in {file.suffix!r}; problems come as {', '.join(SUFFIXES)}")
    try:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    except FileNotFoundError:
        raise ProblemsError(f"no problem file at {file}") from None
    except IsADirectoryError:
        raise ProblemsError(f"{file} is a directory, not a problem file") from None
    except PermissionError:
        raise ProblemsError(f"no permission to read {file}") from None


def _parquet_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    try:
        with file.open("rb") as handle:
            for batch in pq.ParquetFile(handle).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise ProblemsError(f"{file} is no readable Parquet file: {_one_line(error)}") from None


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ProblemsError(f"{file}, row {number}: no JSON on this line: {error}") from None
            if not isinstance(row, dict):
                raise ProblemsError(f"{file}, row {number}: a row is a JSON object, not {_short(row)}")
            yield number, row


def _column(file: Path, row: Mapping[str, Any], wanted: str | None, known: tuple[str, ...], key: str) -> str:
    for name in (wanted,) if wanted else known:
        if _has(row, name):
            return name
    there = ", ".join(_column_names(row)) or "none"
    if wanted:
        raise ProblemsError(f"{file} has no column {wanted!r} (problems.{key}); its columns: {there}")
    raise ProblemsError(
        f"{file} has none of the columns {', '.join(known)}; its columns: {there}; set problems.{key}"
    )


def _column_names(row: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, cell in row.items():
        if isinstance(cell, Mapping):
            yield from _column_names(cell, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _has(row: Mapping[str, Any], name: str) -> bool:
    try:
        _cell(row, name)
    except ValueError:
        return False
    return True


def _cell(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    cell: Any = row
    for part in name.split("."):
        if not isinstance(cell, Mapping) or part not in cell:
            raise ValueError(f"the column {name!r} is missing")
        cell = cell[part]
    return cell


def _problem(row: Mapping[str, Any], question_column: str, answer_column: str) -> Problem:
    system_prompt, question = _question(_cell(row, question_column), question_column)
    sources = (row.get(name) for name in SOURCE_COLUMNS)
    return Problem(
        question=question,
        answer=_answer(_cell(row, answer_column), answer_column),
        source=next((source for source in sources if isinstance(source, str)), ""),
        system_prompt=system_prompt,
    )


def _question(cell: Any, column: str) -> tuple[str | None, str]:
    """(system turn, question) of a text or of messages."""
    if isinstance(cell, str):
        return None, _text(cell, column)
    if not isinstance(cell, Sequence) or not all(isinstance(message, Mapping) for message in cell):
        raise ValueError(f"{column} is neither a text nor a list of messages: {_short(cell)}")
    turns = {str(message.get("role")): message.get("content") for message in cell}
    if "user" not in turns:
        raise ValueError(f"{column} has no message of the role 'user': {_short(cell)}")
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
        raise ValueError(f"{column} holds no text: {_short(cell)}")
    return cell


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
