"""The forms that `ampo store export` writes: columns, and a problem's traces as rows of them. Pure.

verl    a row a problem: prompt, reward_model, ..., target_lst with a {content, source, ...} for each trace
luffy   a row a trace: the same columns, with target, a list of the one message
chat    a row a trace: messages of system, user and assistant, as supervised trainers take them
hf      a row a trace: question, answer, teacher, text, verdict, ... for `datasets.load_dataset`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from store.records import Problem, TeacherRecord, Trace

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

_VERL = [
    ("data_source", pa.string()),
    ("prompt", _MESSAGES),
    ("ability", pa.string()),
    ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
]
_TARGET = pa.struct(
    [
        ("content", pa.string()),
        ("source", pa.string()),
        ("quality_score", pa.float64()),
        ("is_correct", pa.bool_()),
    ]
)
_EXTRA = [("index", pa.int64()), ("split", pa.string()), ("problem_id", pa.string())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A problem with the traces that are to be exported, at least one."""

    index: int
    """0-based, of the problems exported."""
    problem: Problem
    traces: Sequence[Trace]
    teachers: Mapping[str, TeacherRecord]
    """By name; a teacher whose record is lost is missing."""
    system_prompt: str | None
    """In the place of every system turn; None: keep each, empty: none at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of rows."""

    schema: pa.Schema
    rows: Callable[[Solved], Iterator[dict[str, Any]]]


def verl_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """One row. The published loader orders a problem's traces by `quality_score`, highest first, and calls
    that short first: it is the inverse of the length in characters."""
    targets = [
        {
            "content": trace.text,
            "source": trace.teacher,
            "quality_score": 1 / max(len(trace.text), 1),
            "is_correct": trace.is_correct,
        }
        for trace in solved.traces
    ]
    yield {**_verl_columns(solved), "target_lst": targets, "extra_info": _extra(solved)}


def luffy_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """A row a trace."""
    for trace in solved.traces:
        yield {
            **_verl_columns(solved),
            "target": [{"role": "assistant", "content": trace.text}],
            "extra_info": {**_extra(solved), "teacher": trace.teacher},
        }


def chat_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """A row a trace; its system turn is the one that the teacher had."""
    for trace in solved.traces:
        record = solved.teachers.get(trace.teacher)
        turn = solved.problem.system_prompt
        if record is not None and record.system_prompt is not None:
            turn = record.system_prompt
        yield {"messages": [*_prompt(solved, turn), {"role": "assistant", "content": trace.text}]}


def hf_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """A row a trace, everything but tokens and log-probs."""
    problem = solved.problem
    for trace in solved.traces:
        yield {
            "problem_id": problem.problem_id,
            "question": problem.question,
            "answer": problem.answer,
            "source": problem.source,
            "system_prompt": problem.system_prompt,
            "final_answer": trace.answer,
            **{name: getattr(trace, name) for name in _TRACE_COLUMNS},
        }


def _verl_columns(solved: Solved) -> dict[str, Any]:
    return {
        "data_source": solved.problem.source,
        "prompt": _prompt(solved, solved.problem.system_prompt),
        "ability": "math",
        "reward_model": {"ground_truth": solved.problem.answer, "style": "rule"},
    }


def _prompt(solved: Solved, turn: str | None) -> list[dict[str, str]]:
    system = turn if solved.system_prompt is None else solved.system_prompt
    question = {"role": "user", "content": solved.problem.question}
    return [{"role": "system", "content": system}, question] if system else [question]


def _extra(solved: Solved) -> dict[str, Any]:
    return {"index": solved.index, "split": "train", "problem_id": solved.problem.problem_id}


_TRACE_COLUMNS: dict[str, pa.DataType] = {
    "teacher": pa.string(),
    "sample_index": pa.int32(),
    "text": pa.string(),
    "n_tokens": pa.int32(),
    "finish_reason": pa.string(),
    "verdict": pa.string(),
    "verdict_detail": pa.string(),
    "is_correct": pa.bool_(),
    "filtered": pa.string(),
    "generation_fingerprint": pa.string(),
    "trace_id": pa.string(),
}

FORMS = {
    "verl": Form(
        schema=pa.schema([*_VERL, ("target_lst", pa.list_(_TARGET)), ("extra_info", pa.struct(_EXTRA))]),
        rows=verl_rows,
    ),
    "luffy": Form(
        schema=pa.schema(
            [
                *_VERL,
                ("target", _MESSAGES),
                ("extra_info", pa.struct([*_EXTRA, ("teacher", pa.string())])),
            ]
        ),
        rows=luffy_rows,
    ),
    "chat": Form(schema=pa.schema([("messages", _MESSAGES)]), rows=chat_rows),
    "hf": Form(
        schema=pa.schema(
            [(name, pa.string()) for name in ("problem_id", "question", "answer", "source", "system_prompt")]
            + [("final_answer", pa.string())]
            + list(_TRACE_COLUMNS.items())
        ),
        rows=hf_rows,
    ),
}
"""By the name that `--to` takes; a new form is a new short function here."""
