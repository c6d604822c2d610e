"""Rows of anybody's Parquet or JSON-lines files, one at a time, and what their cells hold.

One rule for text, chat and gold cells serves problem files, imported traces and `ampo verify`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from precompute.config_file import short
from store.errors import ProblemsError

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")

BATCH_ROWS = 64
"""Rows of a Parquet file that are in memory at once; a row may hold several long solutions."""
READ_BYTES = 1 << 20

Row = Mapping[str, Any]


class Turn(NamedTuple):
    """A text in a cell, with the other facts of its entry."""

    text: str
    """Empty where there is none."""
    role: str | None = None
    source: str | None = None


def data_rows(
    file: Path, *, kind: str = "data file", columns: list[str] | None = None
) -> Iterator[tuple[int, Row]]:
    """Yields (row number from 1, row) of a .parquet file, or of a .jsonl, .ndjson or .json file with an
    object a line, whose row number is the line's.

    Of a Parquet file only the `columns` are read, e.g. `reward_model.ground_truth`; None: all.
    Raises ProblemsError, calling the file a `kind`.
    """
    if file.suffix not in SUFFIXES:
        raise ProblemsError(f"{file} ends in {file.suffix!r}; a {kind} ends in {', '.join(SUFFIXES)}")
    try:
        yield from _parquet_rows(file, columns) if file.suffix == ".parquet" else _json_rows(file)
    except FileNotFoundError:
        raise ProblemsError(f"no {kind} at {file}") from None
    except OSError as error:
        raise ProblemsError(f"cannot read {file}: {error.strerror}") from None


def _parquet_rows(file: Path, columns: list[str] | None) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        with file.open("rb") as handle, pq.ParquetFile(handle, buffer_size=READ_BYTES) as parquet:
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise ProblemsError(
            f"{file} is not a readable Parquet file: {' '.join(str(error).split())}"
        ) from None


def _json_rows(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ProblemsError(f"{file}, row {number}: this line is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ProblemsError(f"{file}, row {number}: a row is a JSON object, not {short(row)}")
            yield number, row


def find_column(file: Path, row: Row, wanted: str | None, known: tuple[str, ...], option: str) -> str:
    """Returns the column `wanted`, or for None the first of `known` that the row has.

    Raises ProblemsError that names the row's columns, and the `option` that chooses.
    """
    names = (wanted,) if wanted else known
    for name in names:
        if has_cell(row, name):
            return name
    raise ProblemsError(
        f"{file} has no column {' or '.join(map(repr, names))} ({option}); its columns: "
        f"{', '.join(column_names(row)) or 'none'}"
    )


def column_names(row: Row, above: str = "") -> Iterator[str]:
    """Yields every column by its dotted name."""
    for name, cell in row.items():
        if isinstance(cell, Mapping):
            yield from column_names(cell, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def has_cell(row: Row, name: str) -> bool:
    """Returns whether the row has the column, which may be empty."""
    return name in row or name in column_names(row)


def cell_of(row: Row, name: str) -> Any:
    """Returns the content of a column, e.g. of `reward_model.ground_truth`. ValueError without it."""
    if name in row:
        return row[name]
    cell: Any = row
    for part in name.split("."):
        if not isinstance(cell, Mapping) or part not in cell:
            raise ValueError(f"the column {name!r} is missing")
        cell = cell[part]
    return cell


def turns_of(cell: Any, column: str) -> list[Turn]:
    """Returns the texts of a cell: a text, a list of texts, or a list of {content, role, source}.

    ValueError when it holds something else.
    """
    if cell is None:
        return []
    if isinstance(cell, str):
        return [Turn(cell)]
    if not isinstance(cell, list):
        raise ValueError(f"{column} is neither a text nor a list of messages: {short(cell)}")
    turns = []
    for entry in cell:
        turn = entry if isinstance(entry, Mapping) else {"content": entry}
        text = turn.get("content")
        if not isinstance(text, str | None):
            raise ValueError(f"{column} has a message that is not text: {short(text)}")
        turns.append(Turn(text or "", turn.get("role"), turn.get("source")))
    return turns


def gold_of(cell: Any, column: str) -> str:
    """Returns the gold answer in a cell: text, or a number as it is written, alone or as a list's only entry.

    Empty where the cell is. ValueError when it holds something else.
    """
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, int | float | Decimal) and not isinstance(cell, bool) and math.isfinite(cell):
        return str(cell)
    if not isinstance(cell, str | None):
        raise ValueError(f"{column} is neither a text nor a number: {short(cell)}")
    return cell or ""
