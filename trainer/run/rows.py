"""Records as Parquet: a dataclass a table, a field a column."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from store.format.files import whole_file

T = TypeVar("T")

_ARROW = {
    "str": pa.string(),
    "int": pa.int32(),
    "bool": pa.bool_(),
    "float": pa.float64(),
    "tuple[int, ...]": pa.list_(pa.int32()),
    "tuple[float, ...]": pa.list_(pa.float64()),
}


def write_rows(path: Path, record: type, rows: Iterable[Any], *, step: int | None = None) -> None:
    """Writes records of the dataclass `record`; `step` is a column before theirs."""
    columns = {field.name: _ARROW[str(field.type).removesuffix(" | None")] for field in fields(record)}
    first = {} if step is None else {"step": step}
    schema = pa.schema({**dict.fromkeys(first, pa.int32()), **columns})
    table = pa.Table.from_pylist([first | asdict(row) for row in rows], schema=schema)
    with whole_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_rows(path: Path, record: type[T]) -> list[T]:
    """Returns the records of a file that was written without a step."""
    return [record(**row) for row in pq.read_table(path).to_pylist()]
