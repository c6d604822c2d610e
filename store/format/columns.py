"""The columns of a store in one table: on disk, in the index, in SQL, in exports. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from store.records import TeacherRecord


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    name: str
    kind: str
    """`string`, `int32`, `int64`, `bool`, `time` (UTC), `int32s` or `float32s` (lists)."""
    doc: str


TRACE_COLUMNS = (
    Column("trace_id", "string", "content hash of problem_id, teacher, sample_index and text"),
    Column("problem_id", "string", "content hash of the problem"),
    Column("teacher", "string", "name of the teacher that wrote the trace"),
    Column("sample_index", "int32", "0-based index among the samples of this teacher and problem"),
    Column("text", "string", "the trace as the teacher wrote it"),
    Column("answer", "string", "the final answer found in the text, or null"),
    Column("answer_start", "int32", "character offset of the answer in the text, or null"),
    Column("n_tokens", "int32", "length in the teacher's tokens, 0: unknown"),
    Column("token_ids", "int32s", "the teacher's token ids"),
    Column("logprobs", "float32s", "the teacher's log-probability of each token"),
    Column("finish_reason", "string", "`stop`: ended by itself; `length`: truncated"),
    Column("verdict", "string", "the verifier's verdict"),
    Column("is_correct", "bool", "verified: the verdict is `match` and the trace was not truncated"),
    Column("seed", "int64", "seed of this sample"),
    Column("generation_fingerprint", "string", "content hash of the teacher's recipe"),
    Column("created_at", "time", "time of writing, UTC"),
    Column("verdict_detail", "string", "reason of the verdict"),
    Column("parsed_answer", "string", "the answer as the verifier read it, or null"),
    Column("parsed_gold", "string", "the gold answer as the verifier read it, or null"),
    Column("filtered", "string", "reason why a filter excludes the trace, or null"),
)

PROBLEM_COLUMNS = (
    Column("problem_id", "string", "content hash of question and answer"),
    Column("question", "string", "the question"),
    Column("answer", "string", "the gold answer"),
    Column("source", "string", "origin of the problem"),
    Column("system_prompt", "string", "system turn that came with the problem, or null"),
)

TEACHER_COLUMNS = (*TeacherRecord.__dataclass_fields__, "generation_fingerprint")

PART_COLUMNS = ("part", "size", "mtime_ns", "rows", "error")
"""Path below parts/, bytes, time of the last change, traces, and the reason why the part cannot be read."""

TOKEN_COLUMNS = ("token_ids", "logprobs")
"""Two thirds of a row's bytes; read on demand only."""

BIG_COLUMNS = ("text", *TOKEN_COLUMNS)
"""Columns that the index does not hold."""

VIEWS: Mapping[str, Sequence[str]] = {
    "traces": (*(column.name for column in TRACE_COLUMNS), "is_usable"),
    "problems": [column.name for column in PROBLEM_COLUMNS],
    "teachers": TEACHER_COLUMNS,
    "parts": PART_COLUMNS,
}
"""The views of `ampo inspect store sql`."""


def views_help() -> str:
    """Returns the views and their columns in markdown."""
    views = (f"**{name}** ({', '.join(columns)})" for name, columns in VIEWS.items())
    return f"Views: {'; '.join(views)}."
