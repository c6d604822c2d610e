"""The Arrow schemas on disk, and records to rows and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from store.format.columns import BIG_COLUMNS, PROBLEM_COLUMNS, TRACE_COLUMNS, json_text
from store.records import Problem, TeacherRecord, Trace

SCHEMA_VERSION = 3
"""Raised whenever an older reader could misread the files of a newer writer."""

ROW_GROUP_ROWS = 16
"""Traces that are decompressed to fetch one; `python -m bench.store_lookup` has the measurements."""


def _list_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


_TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "bool": pa.bool_(),
    "time": pa.timestamp("us", tz="UTC"),
    "int32s": _list_of(pa.int32()),
    "float32s": _list_of(pa.float32()),
}


def schema_of(columns: Mapping[str, str]) -> pa.Schema:
    """Returns the Arrow schema of columns such as TRACE_COLUMNS."""
    return pa.schema(
        [pa.field(name, _TYPES[kind], nullable=name not in BIG_COLUMNS) for name, kind in columns.items()]
    )


TRACE_SCHEMA = schema_of(TRACE_COLUMNS)
PROBLEM_SCHEMA = schema_of(PROBLEM_COLUMNS)

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    # A tenth smaller than at level 1, and read as fast.
    "compression_level": 6,
    "use_dictionary": False,
    # Minima and maxima of texts and tokens would only enlarge the footer.
    "write_statistics": ["problem_id"],
    "write_page_checksum": True,
}

PART_OPTIONS: dict[str, Any] = PARQUET_OPTIONS | {
    "row_group_size": ROW_GROUP_ROWS,
    # The exponents of log-probabilities hardly differ: separated from the mantissas they compress.
    "column_encoding": {"logprobs.list.element": "BYTE_STREAM_SPLIT"},
}


def table_of(records: Sequence[Trace] | Sequence[Problem], schema: pa.Schema) -> pa.Table:
    """Returns one row a record, in the order given."""
    columns = [[_cell(getattr(record, field.name), field) for record in records] for field in schema]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema
    )


def _cell(value: Any, field: pa.Field) -> Any:
    """Returns the value; what is no text in a column of texts (metadata, turns) as JSON."""
    is_json = isinstance(value, Mapping | tuple) and field.type == pa.string()
    return json_text(value) if is_json else value


def teacher_json(record: TeacherRecord) -> dict[str, Any]:
    """Returns the content of `teachers/<name>.json`: the record, and the fingerprint of its recipe."""
    return {**asdict(record), "generation_fingerprint": record.generation_fingerprint}
