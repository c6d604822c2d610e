"""Rows of anybody's Parquet or JSON-lines files, one at a time, and their cells by dotted names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import ProblemsError

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")

BATCH_ROWS = 64
"""Rows of a Parquet file that are in memory at once; a row may hold several long solutions."""
READ_BYTES = 1 << 20

Row = Mapping[str, Any]
Leaf = tuple[str, ...]
"""Where a value lies in a Parquet schema, from the outside in, e.g. ("reward_model", "ground_truth")."""


def data_rows(
    file: Path, *, kind: str = "data file", skip: Callable[[Leaf], bool] | None = None
) -> Iterator[tuple[int, Row]]:
    """(row number from 1, row) of a .parquet file, or of a .jsonl, .ndjson or .json file with an object a
    line, whose row number is the line's.

    `skip` says of a Parquet file's leaves which need not be read; they are then missing from the rows, but
    every column keeps one at least.
    Raises ProblemsError, calling the file a `kind`.
    """
    if file.suffix not in SUFFIXES:
        raise ProblemsError(f"{file} ends in {file.suffix!r}; a {kind} ends in {', '.join(SUFFIXES)}")
    try:
        yield from _parquet_rows(file, skip) if file.suffix == ".parquet" else _json_rows(file)
    except FileNotFoundError:
        raise ProblemsError(f"no {kind} at {file}") from None
    except IsADirectoryError:
        raise ProblemsError(f"{file} is a directory, not a {kind}") from None
    except PermissionError:
        raise ProblemsError(f"no permission to read {file}") from None


def _parquet_rows(file: Path, skip: Callable[[Leaf], bool] | None) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        with file.open("rb") as handle, pq.ParquetFile(handle, buffer_size=READ_BYTES) as parquet:
            leaves = _wanted(parquet.schema, skip)
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=leaves, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise ProblemsError(f"{file} is no readable Parquet file: {' '.join(str(error).split())}") from None


def _wanted(schema: Any, skip: Callable[[Leaf], bool] | None) -> list[str]:
    """The leaves to read; no column goes without any."""
    leaves = [tuple(schema.column(index).path.split(".")) for index in range(len(schema))]
    wanted = [leaf for leaf in leaves if skip is None or not skip(leaf)]
    whole = {leaf[0] for leaf in leaves} - {leaf[0] for leaf in wanted}
    return [".".join(leaf) for leaf in leaves if leaf in wanted or leaf[0] in whole]


def _json_rows(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ProblemsError(f"{file}, row {number}: no JSON on this line: {error}") from None
            if not isinstance(row, dict):
                raise ProblemsError(f"{file}, row {number}: a row is a JSON object, not {short(row)}")
            yield number, row


def find_column(file: Path, row: Row, wanted: str | None, known: tuple[str, ...], option: str) -> str:
    """The column `wanted`, or for None the first of `known` that the row has.

    Raises ProblemsError that names the columns there are, and the `option` that chooses.
    """
    for name in (wanted,) if wanted else known:
        if has_cell(row, name):
            return name
    there = ", ".join(column_names(row)) or "none"
    if wanted:
        raise ProblemsError(f"{file} has no column {wanted!r} ({option}); its columns: {there}")
    raise ProblemsError(
        f"{file} has none of the columns {', '.join(known)}; its columns: {there}; set {option}"
    )


def column_names(row: Row, above: str = "") -> Iterator[str]:
    """Every column by its dotted name."""
    for name, cell in row.items():
        if isinstance(cell, Mapping):
            yield from column_names(cell, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def has_cell(row: Row, name: str) -> bool:
    """Whether the row has the column, be it empty."""
    try:
        cell_of(row, name)
    except ValueError:
        return False
    return True


def cell_of(row: Row, name: str) -> Any:
    """The content of a column, `reward_model.ground_truth` from the outside in. ValueError without it."""
    if name in row:
        return row[name]
    cell: Any = row
    for part in name.split("."):
        if not isinstance(cell, Mapping) or part not in cell:
            raise ValueError(f"the column {name!r} is missing")
        cell = cell[part]
    return cell


def short(value: Any) -> str:
    """A value in an error message: its repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
