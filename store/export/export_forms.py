"""The forms of `ampo store export`: one function a form, from a problem with its traces to rows. Pure.

verl    a row a problem: prompt, reward_model, ..., target_lst with a {content, source, ...} for each trace
luffy   a row a trace: the same columns, with target, a list of the one message
chat    a row a trace: messages of system, user and assistant, for supervised trainers
dpo     a row a pair of a verified and a wrong trace: prompt, chosen, rejected, as TRL's DPOTrainer reads them
trl     a row a problem: prompt, solution, as TRL's GRPOTrainer and its accuracy_reward read them
hf      a row a trace: question, answer, teacher, text, verdict, ... for `datasets.load_dataset`

To add a form, add a function and an entry in EXPORT_FORMS, or give `--to` your own as `file.py:function`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from store.format.columns import PROBLEM_COLUMNS, TOKEN_COLUMNS, TRACE_COLUMNS, json_text
from store.records import Problem, TeacherRecord, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Selection of traces and their form."""

    everything: bool = False
    """Wrong and filtered traces too; otherwise usable ones alone."""
    teachers: tuple[str, ...] = ()
    """Empty: all."""
    max_per_problem: int | None = None
    """The teachers take turns: the first trace of each, then the second. In the form dpo: pairs."""
    system_prompt: str | None = None
    """Replaces every system turn; None: the problem's (chat: the teacher's), empty: none."""
    overwrite: bool = False


@dataclass(slots=True, kw_only=True)
class ExportReport:
    """Counts of an export."""

    path: str
    form: str
    problems: int = 0
    """With at least one trace."""
    rows: int = 0
    traces: dict[str, int]
    """By teacher."""

    @property
    def line(self) -> str:
        """The report in one line."""
        teachers = ", ".join(f"{name} {count:,}" for name, count in sorted(self.traces.items()))
        return (
            f"wrote {self.path}: {self.form}, {self.rows:,} rows, {self.problems:,} problems, "
            f"{sum(self.traces.values()):,} traces ({teachers})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A problem with the traces to export, at least one."""

    index: int
    """0-based among the exported problems."""
    problem: Problem
    traces: Sequence[Trace]
    """In the form dpo: verified and wrong ones in turns."""
    teachers: Mapping[str, TeacherRecord]
    """By name; a teacher whose record is lost is missing."""
    system_prompt: str | None
    """Replaces every system turn; None: keep each, empty: none at all."""


Form = Callable[[Solved], Iterator[dict[str, Any]]]


def verl_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """Yields one row. The published loader sorts a problem's traces by `quality_score`, highest first, to get
    the shortest first: the score is the inverse of the length in characters."""
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
    """Yields a row a trace."""
    for trace in solved.traces:
        yield {
            **_verl_columns(solved),
            "target": [{"role": "assistant", "content": trace.text}],
            "extra_info": {**_extra(solved), "teacher": trace.teacher},
        }


def chat_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """Yields a row a trace, with the teacher's system turn."""
    for trace in solved.traces:
        record = solved.teachers.get(trace.teacher)
        turn = solved.problem.system_prompt
        if record is not None and record.system_prompt is not None:
            turn = record.system_prompt
        yield {"messages": [*_prompt(solved, turn), {"role": "assistant", "content": trace.text}]}


def dpo_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """Yields a row a pair: messages up to the response, the verified one, the wrong one."""
    prompt = _prompt(solved, solved.problem.system_prompt)
    for chosen, rejected in zip(solved.traces[::2], solved.traces[1::2], strict=True):
        responses = {"chosen": chosen.text, "rejected": rejected.text}
        messages = {name: [{"role": "assistant", "content": text}] for name, text in responses.items()}
        yield {"prompt": prompt, **messages}


def trl_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """Yields one row: messages up to the response, and the gold answer."""
    yield {
        "prompt": _prompt(solved, solved.problem.system_prompt),
        "solution": solved.problem.answer,
        "problem_id": solved.problem.problem_id,
    }


_HF_TRACE = {
    name: kind
    for name, kind in TRACE_COLUMNS.items()
    if name not in ("problem_id", "answer", "answer_start", "seed", "created_at", *TOKEN_COLUMNS)
}
HF_COLUMNS = {**PROBLEM_COLUMNS, "final_answer": "string", **_HF_TRACE}
"""Columns of the form `hf`."""


def hf_rows(solved: Solved) -> Iterator[dict[str, Any]]:
    """Yields a row a trace, without tokens and log-probabilities."""
    problem = {name: getattr(solved.problem, name) for name in PROBLEM_COLUMNS}
    problem |= {name: json_text(problem[name]) for name in ("metadata", "turns")}
    for trace in solved.traces:
        columns = {name: getattr(trace, name) for name in _HF_TRACE}
        yield {**problem, "final_answer": trace.answer, **columns}


def _verl_columns(solved: Solved) -> dict[str, Any]:
    return {
        "data_source": solved.problem.source,
        "prompt": _prompt(solved, solved.problem.system_prompt),
        "ability": "math",
        "reward_model": {"ground_truth": solved.problem.answer, "style": "rule"},
    }


def _prompt(solved: Solved, turn: str | None) -> list[dict[str, str]]:
    system = turn if solved.system_prompt is None else solved.system_prompt
    turns = (*([("system", system)] if system else []), *solved.problem.user_turns)
    return [{"role": role, "content": text} for role, text in turns]


def _extra(solved: Solved) -> dict[str, Any]:
    """Returns the problem's metadata and its number; columns of all rows are those of the first."""
    numbers = {"index": solved.index, "split": "train", "problem_id": solved.problem.problem_id}
    return {**solved.problem.metadata, **numbers}


EXPORT_FORMS: dict[str, Form] = {
    "verl": verl_rows,
    "luffy": luffy_rows,
    "chat": chat_rows,
    "dpo": dpo_rows,
    "trl": trl_rows,
    "hf": hf_rows,
}
"""By the name that `--to` takes."""
