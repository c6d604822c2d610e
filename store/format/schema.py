"""The columns on disk, and the way from records to rows and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from store.records import Problem, TeacherRecord, Trace

SCHEMA_VERSION = 2
"""Raised whenever an older reader could misread what a newer writer wrote."""

PAGE_ROWS = 8
"""What fetching one trace must decompress beside it; `python -m bench.store_lookup` has the measurements."""

ROW_GROUP_ROWS = 4096
"""Large, so that the footer stays small and DuckDB, pandas and polars read fast."""

BIG_COLUMNS = ("text", "token_ids", "logprobs")
"""What the index does not hold: fetched page by page (store/format/pages.py)."""

TOKEN_COLUMNS = ("token_ids", "logprobs")
"""Two thirds of a row's bytes; read on demand only."""


def _required_list(name: str, element: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", element, nullable=False)), nullable=False)


TRACE_SCHEMA = pa.schema(
    [
        ("trace_id", pa.string()),
        ("problem_id", pa.string()),
        ("teacher", pa.string()),
        ("sample_index", pa.int32()),
        pa.field("text", pa.string(), nullable=False),
        ("answer", pa.string()),
        ("answer_start", pa.int32()),
        ("n_tokens", pa.int32()),
        _required_list("token_ids", pa.int32()),
        _required_list("logprobs", pa.float32()),
        ("finish_reason", pa.string()),
        ("verdict", pa.string()),
        ("is_correct", pa.bool_()),
        ("seed", pa.int64()),
        ("generation_fingerprint", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
        ("verdict_detail", pa.string()),
        ("parsed_answer", pa.string()),
        ("parsed_gold", pa.string()),
        ("filtered", pa.string()),
    ]
)

PROBLEM_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("source", pa.string()),
        ("system_prompt", pa.string()),
    ]
)

SMALL_COLUMNS = [name for name in TRACE_SCHEMA.names if name not in BIG_COLUMNS]

PLAIN_COLUMNS = [name for name in SMALL_COLUMNS if name not in ("trace_id", "problem_id", "created_at")]
"""What the index holds as it stands in a part; the other three are numbers there."""

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    # A tenth smaller than at level 1, and read as fast.
    "compression_level": 6,
    "use_dictionary": False,
    # Minima and maxima of texts and tokens are dead weight: no query asks for them.
    "write_statistics": ["problem_id"],
    "write_page_checksum": True,
}

PART_OPTIONS: dict[str, Any] = PARQUET_OPTIONS | {
    "row_group_size": ROW_GROUP_ROWS,
    "max_rows_per_page": PAGE_ROWS,
    "data_page_size": 2**30,  # the rows alone decide where a page ends
    "data_page_version": "2.0",
    # The exponents of log-probabilities hardly differ: apart from the mantissas they compress.
    "column_encoding": {"logprobs.list.element": "BYTE_STREAM_SPLIT"},
}


def traces_table(traces: Sequence[Trace]) -> pa.Table:
    """One row a trace, in the order given."""
    return _table(traces, TRACE_SCHEMA)


def problems_table(problems: Sequence[Problem]) -> pa.Table:
    """One row a problem, in the order given."""
    return _table(problems, PROBLEM_SCHEMA)


def _table(records: Sequence[Any], schema: pa.Schema) -> pa.Table:
    columns = [[getattr(record, name) for record in records] for name in schema.names]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema
    )


def problem_of(row: Mapping[str, Any]) -> Problem:
    """The record of a row. Raises ValueError when the content does not hash to the row's problem_id."""
    problem = Problem(**{name: value for name, value in row.items() if name != "problem_id"})
    if problem.problem_id != row["problem_id"]:
        raise ValueError(
            f"problem_id {row['problem_id']} does not fit its content, which gives {problem.problem_id}"
        )
    return problem


def teacher_json(record: TeacherRecord) -> dict[str, Any]:
    """What `teachers/<name>.json` holds: the record, and the fingerprint that its traces carry."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    fields["chat_template_kwargs"] = dict(record.chat_template_kwargs)
    fields["sampling"] = dict(record.sampling)
    return {**fields, "generation_fingerprint": record.generation_fingerprint}


def teacher_of(content: Mapping[str, Any]) -> TeacherRecord:
    """The record that `teacher_json` wrote. Raises TypeError when fields are missing or unknown."""
    return TeacherRecord(
        **{name: value for name, value in content.items() if name != "generation_fingerprint"}
    )
