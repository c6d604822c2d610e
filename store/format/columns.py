"""The columns of a store in one table: on disk, in the index, in SQL, in exports. Loads nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from store.records import TeacherRecord

TRACE_COLUMNS = {
    "trace_id": "string",
    "problem_id": "string",
    "teacher": "string",
    "sample_index": "int32",
    "text": "string",
    "answer": "string",
    "answer_start": "int32",
    "n_tokens": "int32",
    "token_ids": "int32s",
    "logprobs": "float32s",
    "finish_reason": "string",
    "verdict": "string",
    "is_correct": "bool",
    "seed": "int64",
    "generation_fingerprint": "string",
    "created_at": "time",
    "verified_by": "string",
    "verdict_detail": "string",
    "parsed_answer": "string",
    "parsed_gold": "string",
    "filtered": "string",
}
"""Field of store.records.Trace -> its kind: a `time` is in UTC, `int32s` and `float32s` are lists."""

PROBLEM_COLUMNS = {
    "problem_id": "string",
    "question": "string",
    "answer": "string",
    "source": "string",
    "system_prompt": "string",
    "turns": "string",
    "verifier": "string",
    "metadata": "string",
}

TEACHER_COLUMNS = (*TeacherRecord.__dataclass_fields__, "generation_fingerprint")

PART_COLUMNS = ("part", "size", "mtime_ns", "rows", "error")
"""Path below parts/, bytes, time of the last change, traces, and the reason why the part cannot be read."""

TOKEN_COLUMNS = ("token_ids", "logprobs")
"""Two thirds of a row's bytes; read on demand only."""

BIG_COLUMNS = ("text", *TOKEN_COLUMNS)
"""Columns that the index does not hold."""

VIEWS: Mapping[str, Sequence[str]] = {
    "traces": (*TRACE_COLUMNS, "is_usable"),
    "problems": tuple(PROBLEM_COLUMNS),
    "teachers": TEACHER_COLUMNS,
    "parts": PART_COLUMNS,
}
"""The views of `ampo inspect store sql`."""


def json_text(value: object) -> str:
    """Returns the metadata or the turns of a problem as a column holds them."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def views_help() -> str:
    """Returns the views and their columns in markdown."""
    views = (f"**{name}** ({', '.join(columns)})" for name, columns in VIEWS.items())
    return f"Views: {'; '.join(views)}."
