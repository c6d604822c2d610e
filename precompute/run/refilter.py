"""Filters of stored traces, and new filters for them without sampling.

The filters depend on the stored text alone, so that a changed [filters] costs no sample: `refilter` rewrites
the parts with other results and then notes the filters in the teachers' records. Until then the records name
the old filters, and a run under the new ones is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from precompute.config import FiltersConfig
from precompute.problems.prompts import demanded_form
from precompute.run.filters import why_filtered
from precompute.verify.final_answer import find_answer
from store.errors import RecipeChangedError
from store.format.manifest import read_manifest
from store.format.reading import chosen_teachers, read_problems, read_teachers
from store.records import AnswerForm, Problem, TeacherRecord
from store.upkeep.compaction import rewrite_parts
from store.writer import StoreWriter, recipe_changes

READ_COLUMNS = ["teacher", "problem_id", "text", "n_tokens", "answer_start", "is_correct", "filtered"]


@dataclass(slots=True)
class RefilterReport:
    """Counts for one teacher."""

    teacher: str
    traces: int = 0
    verified: int = 0
    filtered_before: int = 0
    """Verified ones that a filter rejected before."""
    filtered_now: int = 0


def filter_settings(filters: FiltersConfig) -> dict[str, Any]:
    """Returns the filters for a teacher's record: every setting, or {} if none is on."""
    on = (filters.min_tokens, filters.max_tokens, filters.max_repetition, filters.scripts, filters.format)
    if not any(value not in (None, (), False) for value in on):
        return {}
    return filters.model_dump(mode="json")


def check_filters(writer: StoreWriter, record: TeacherRecord) -> None:
    """Raises RecipeChangedError if other filters were applied to the teacher's traces in the store."""
    known = read_teachers(writer.path).get(record.name)
    if known is None or dict(known.filters) == dict(record.filters) or not writer.done(record.name):
        return
    off = FiltersConfig().model_dump(mode="json")
    changes = "; ".join(recipe_changes(off | dict(known.filters), off | dict(record.filters), "filters."))
    raise RecipeChangedError(
        f"teacher {record.name!r} has traces in {writer.path} under other filters: {changes}; `ampo store "
        "refilter` with this config applies these filters to them, without sampling again"
    )


def refilter(
    path: str | os.PathLike[str],
    filters: FiltersConfig,
    *,
    teachers: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda read, total: None,
) -> tuple[RefilterReport, ...]:
    """Applies `filters` to the stored traces of `teachers` (None: all of the store).

    `progress` is called with (traces read, all traces). Stopped at any moment, the same call goes on.
    Raises what StoreWriter.open raises, StoreDamagedError for a part that cannot be read, and StoreError for
    an unknown teacher or a full disk; the store is then as before.
    """
    root = Path(path).absolute()
    read_manifest(root)
    with StoreWriter.reopen(root) as writer:
        records = chosen_teachers(root, teachers)
        problems = {problem.problem_id: problem for problem in read_problems(root)}
        counts = {name: RefilterReport(name) for name in records}
        parts = {p: entry for p, entry in read_manifest(root).parts.items() if entry.traces.keys() & records}
        change = partial(_refiltered, filters=filters, records=records, problems=problems, counts=counts)
        rewrite_parts(root, parts, change, progress)
        # Last: as long as the records name the old filters, a run is refused and names `refilter`.
        for record in records.values():
            writer.register_teacher(replace(record, filters=filter_settings(filters)))
    return tuple(counts.values())


def _refiltered(
    table: pa.Table,
    *,
    filters: FiltersConfig,
    records: Mapping[str, TeacherRecord],
    problems: Mapping[str, Problem],
    counts: Mapping[str, RefilterReport],
) -> pa.Table | None:
    """Returns the part's rows with new filter results, and counts them; None if nothing has changed."""
    after = []
    for row in table.select(READ_COLUMNS).to_pylist():
        now = before = row["filtered"]
        if record := records.get(row["teacher"]):
            now = _why_filtered(filters, record, problems[row["problem_id"]], row)
            count, verified = counts[record.name], row["is_correct"]
            count.traces += 1
            count.verified += verified
            count.filtered_before += verified and before is not None
            count.filtered_now += verified and now is not None
        after.append(now)
    if after == table["filtered"].to_pylist():
        return None
    column = table.schema.get_field_index("filtered")
    return table.set_column(column, table.schema.field(column), pa.array(after, pa.string()))


def _why_filtered(
    filters: FiltersConfig, record: TeacherRecord, problem: Problem, row: Mapping[str, Any]
) -> str | None:
    text, form = row["text"], demanded_form(record, problem)
    opens_think = opened_thought(text, form, row["answer_start"])
    return why_filtered(filters, text=text, n_tokens=row["n_tokens"], form=form, opens_think=opens_think)


def opened_thought(text: str, form: AnswerForm | None, answer_start: int | None) -> bool:
    """Returns True if a stored text's prompt ended inside a `<think>` block: if only then its answer is found
    where it was."""
    plain, thought = (
        find_answer(text, form=form, opens_think=opens).answer_start == answer_start
        for opens in (False, True)
    )
    return thought and not plain
