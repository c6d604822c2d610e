"""Other verdicts on stored traces without sampling: after another verifier, or a corrected gold answer.

Every trace records the verifier of its verdict. Where a problem's verifier is another now, `check_verdicts`
refuses to go on; `reverify` verifies the stored texts again and rewrites the parts.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from precompute.problems.prompts import demanded_form
from precompute.run.refilter import opened_thought
from precompute.verify.verifier import Verdict, Verifier
from store.errors import StoreError
from store.format.index import open_index
from store.format.manifest import change_verifiers, read_manifest
from store.format.reading import read_problems, read_teachers
from store.records import Problem, TeacherRecord, content_hash
from store.upkeep.compaction import rewrite_parts
from store.writer import REVERIFY, StoreWriter

READ_COLUMNS = [
    "teacher",
    "problem_id",
    "sample_index",
    "text",
    "answer_start",
    "finish_reason",
    "verdict_detail",
    "is_correct",
]

_VERIFIERS = """
    SELECT problem_id, any_value(verified_by) AS verifier FROM idx.traces
    WHERE problem_id IN (SELECT unnest($problem_ids::VARCHAR[])) GROUP BY problem_id, verified_by
"""


@dataclass(slots=True)
class ReverifyReport:
    """Counts for one teacher."""

    teacher: str
    traces: int = 0
    verified_before: int = 0
    verified_now: int = 0
    changed: int = 0
    """Traces that are verified now and were not, or the other way round."""


def check_verdicts(path: Path, problems: Sequence[Problem], verifier: Verifier) -> None:
    """Raises StoreError where stored traces of the problems have verdicts of another verifier."""
    expected = {each.problem_id: " ".join(verifier.record_for(each)) for each in problems}
    with open_index(path) as index:
        stored = index.rows(_VERIFIERS, {"problem_ids": list(expected)})
    others = [row for row in stored if row["verifier"] != expected[row["problem_id"]]]
    if others:
        first = others[0]
        raise StoreError(
            f"{path} has verdicts of {first['verifier']} on {len(others)} problems, e.g. "
            f"{first['problem_id']}, whose verifier is {expected[first['problem_id']]} now; {REVERIFY}"
        )


def reverify(
    path: str | os.PathLike[str],
    verifier: Verifier,
    problems: Sequence[Problem] = (),
    *,
    progress: Callable[[int, int], None] = lambda read, total: None,
) -> tuple[ReverifyReport, ...]:
    """Verifies all stored traces again; `progress` is called with (traces read, all traces).

    `problems` are the present ones: a trace goes to the one with its question where gold answer, verifier or
    metadata have changed. Stopped at any moment, the same call goes on. Raises what StoreWriter.open raises,
    StoreDamagedError for a part that cannot be read, and StoreError for a full disk.
    """
    root = Path(path).absolute()
    with StoreWriter.reopen(root) as writer:
        known, records = read_problems(root), read_teachers(root)
        now = corrected(known, problems)
        writer.write_problems([now[problem.problem_id] for problem in known])
        counts = {name: ReverifyReport(name) for name in records}
        change = partial(_reverified, verifier=verifier, now=now, records=records, counts=counts)
        rewrite_parts(root, read_manifest(root).parts, change, progress)
        current = {problem.problem_id: problem for problem in now.values()}
        writer.write_problems(list(current.values()), drop=now.keys() - current.keys())
        change_verifiers(root, verifier.versions(current.values()))
    return tuple(counts.values())


def corrected(known: Sequence[Problem], problems: Sequence[Problem]) -> dict[str, Problem]:
    """Returns problem_id of each `known` problem -> the present problem: itself, or the only one of
    `problems` with its question."""
    ids, by_question = {problem.problem_id for problem in problems}, defaultdict[object, list[Problem]](list)
    for problem in problems:
        by_question[problem.user_turns].append(problem)
    found = {}
    for problem in known:
        same = by_question[problem.user_turns]
        is_replaced = problem.problem_id not in ids and len(same) == 1
        found[problem.problem_id] = same[0] if is_replaced else problem
    return found


def _reverified(
    table: pa.Table,
    *,
    verifier: Verifier,
    now: Mapping[str, Problem],
    records: Mapping[str, TeacherRecord],
    counts: Mapping[str, ReverifyReport],
) -> pa.Table:
    """Returns the part's rows with new verdicts, and counts them."""
    rows, pending = table.select(READ_COLUMNS).to_pylist(), []
    for row in rows:
        problem, record = now[row["problem_id"]], records[row["teacher"]]
        # Imported texts may mark their answers in any form.
        form = None if record.engine == "import" else demanded_form(record, problem)
        opens = opened_thought(row["text"], form, row["answer_start"])
        pending.append(verifier.submit(row["text"], problem, form, opens_think=opens))
    changes = defaultdict[str, list[Any]](list)
    for row, future in zip(rows, pending, strict=True):
        verdict = future.result()
        for column, value in _columns(row, verdict, now[row["problem_id"]].problem_id).items():
            changes[column].append(value)
        verified, count = changes["is_correct"][-1], counts[row["teacher"]]
        count.traces += 1
        count.verified_before += row["is_correct"]
        count.verified_now += verified
        count.changed += verified is not row["is_correct"]
    for column, values in changes.items():
        at = table.schema.get_field_index(column)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    return table


def _columns(row: Mapping[str, Any], verdict: Verdict, problem_id: str) -> dict[str, Any]:
    """Returns the columns that another verdict changes."""
    has_failed = row["finish_reason"] == "error"  # there is no response to verify
    return {
        "problem_id": problem_id,
        "trace_id": content_hash(problem_id, row["teacher"], row["sample_index"], row["text"]),
        "answer": verdict.answer,
        "answer_start": verdict.answer_start,
        "verdict": "error" if has_failed else verdict.reason,
        "is_correct": verdict.is_correct and row["finish_reason"] == "stop",
        "verified_by": verdict.verifier,
        "verdict_detail": row["verdict_detail"] if has_failed else verdict.detail,
        "parsed_answer": verdict.parsed_answer,
        "parsed_gold": verdict.parsed_gold,
    }
