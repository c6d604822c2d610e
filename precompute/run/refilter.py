"""Which filters a teacher's traces were judged by, and how to judge them anew without drawing anything.

What a filter says follows from the stored text. So a changed [filters] costs no sample: `refilter` writes the
parts anew wherever it says something else, and then notes the filters in the teachers' records. Until then
the records name the old filters, and a run under the new ones is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from precompute.config import AnswerForm, FiltersConfig
from precompute.problems.prompts import demanded_form
from precompute.run.filters import why_filtered
from precompute.verify.final_answer import find_answer
from store.errors import RecipeChangedError, StoreError
from store.format.manifest import PARTS, read_manifest
from store.format.parts import damage_named, open_part, write_part
from store.format.reading import read_problems, read_teachers
from store.records import Problem, TeacherRecord
from store.upkeep.compaction import new_parts, swap_parts
from store.writer import StoreWriter, recipe_changes

READ_COLUMNS = ["teacher", "problem_id", "text", "n_tokens", "answer_start", "is_correct", "filtered"]

Progress = Callable[[int, int], None]
"""Called with (traces looked at, traces in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefilterReport:
    """What judging anew came to, for one teacher."""

    teacher: str
    traces: int = 0
    verified: int = 0
    held_before: int = 0
    """Of the verified: held back by a filter."""
    held_now: int = 0


def filter_settings(filters: FiltersConfig) -> dict[str, Any]:
    """What a teacher's record says of the filters: every setting, or {} when none of them is on."""
    on = (filters.min_tokens, filters.max_tokens, filters.max_repetition, filters.scripts, filters.format)
    if not any(value not in (None, (), False) for value in on):
        return {}
    return filters.model_dump(mode="json")


def check_filters(writer: StoreWriter, record: TeacherRecord) -> None:
    """Raises RecipeChangedError when the store has traces of the teacher that other filters have judged: some
    would be held back by one measure and some by another."""
    known = read_teachers(writer.path).get(record.name)
    if known is None or dict(known.filters) == dict(record.filters) or not writer.done(record.name):
        return
    off = FiltersConfig().model_dump(mode="json")
    changes = "; ".join(recipe_changes(off | dict(known.filters), off | dict(record.filters), "filters."))
    raise RecipeChangedError(
        f"teacher {record.name!r} has traces in {writer.path} that other filters have judged: {changes}; "
        "`ampo store refilter` with this config judges them anew, and nothing is drawn again"
    )


def refilter(
    path: str | os.PathLike[str],
    filters: FiltersConfig,
    *,
    teachers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> tuple[RefilterReport, ...]:
    """Judges the stored traces of `teachers` (None: all of the store) by `filters`, whatever judged them.

    Stopped at any moment, the same call goes on: what a killed one left is judged again.
    Raises what StoreWriter.open raises, StoreDamagedError for a part that cannot be read, and StoreError for
    a teacher that the store does not know or when the disk is full: the store is then as before.
    """
    root = Path(path).absolute()
    read_manifest(root)
    with StoreWriter.reopen(root) as writer:
        records = _chosen(root, teachers)
        judge = _Judge(filters, records, {problem.problem_id: problem for problem in read_problems(root)})
        parts = {p: entry for p, entry in read_manifest(root).parts.items() if entry.traces.keys() & records}
        with new_parts(root) as new:
            old = []
            seen, total = 0, sum(sum(entry.traces.values()) for entry in parts.values())
            for part, entry in parts.items():
                if changed := _judged_anew(root / PARTS / part, judge):
                    name, new[name] = write_part(root, changed)
                    old.append(part)
                seen += sum(entry.traces.values())
                if progress is not None:
                    progress(seen, total)
        swap_parts(root, old=old, new=new)
        # Last: as long as the records name the old filters, whoever comes is told to judge anew.
        for record in records.values():
            writer.register_teacher(replace(record, filters=filter_settings(filters)))
    return tuple(judge.reports.values())


def _chosen(root: Path, names: Sequence[str] | None) -> dict[str, TeacherRecord]:
    records = read_teachers(root)
    for name in names or ():
        if name not in records:
            raise StoreError(f"no teacher {name!r} in {root}; its teachers: {', '.join(records) or 'none'}")
    return {name: record for name, record in records.items() if not names or name in names}


def _judged_anew(path: Path, judge: _Judge) -> pa.Table | None:
    """The part's rows with what the filters say now; None when they say what stands there."""
    with damage_named(path), open_part(path) as file:
        rows = file.read(columns=READ_COLUMNS, use_threads=False)
        before = rows["filtered"].to_pylist()
        after = [judge(row) for row in rows.to_pylist()]
        if after == before:
            return None
        table = file.read(use_threads=False)
    place = table.schema.get_field_index("filtered")
    return table.set_column(place, table.schema.field(place), pa.array(after, pa.string()))


def _opened_think(text: str, form: AnswerForm, answer_start: int | None) -> bool:
    """Whether the prompt ended inside a `<think>` block: only then is the answer found where it was."""
    found = [find_answer(text, form=form, opens_think=opens).answer_start for opens in (False, True)]
    return found[0] != answer_start and found[1] == answer_start


class _Judge:
    """Says of each row what the filters say now, and counts."""

    def __init__(
        self,
        filters: FiltersConfig,
        records: Mapping[str, TeacherRecord],
        problems: Mapping[str, Problem],
    ) -> None:
        self._filters = filters
        self._records = records
        self._problems = problems
        self.reports = {name: RefilterReport(teacher=name) for name in records}

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        record = self._records.get(row["teacher"])
        before: str | None = row["filtered"]
        if record is None:
            return before
        form = demanded_form(record, self._problems[row["problem_id"]])
        now = why_filtered(
            self._filters,
            text=row["text"],
            n_tokens=row["n_tokens"],
            form=form,
            opens_think=_opened_think(row["text"], form, row["answer_start"]),
        )
        self._count(record.name, row["is_correct"], before, now)
        return now

    def _count(self, teacher: str, verified: bool, before: str | None, now: str | None) -> None:
        report = self.reports[teacher]
        self.reports[teacher] = replace(
            report,
            traces=report.traces + 1,
            verified=report.verified + verified,
            held_before=report.held_before + (verified and before is not None),
            held_now=report.held_now + (verified and now is not None),
        )
