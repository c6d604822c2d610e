"""`ampo store export`: a store's traces in other programs' forms. The output appears whole or not at all.

The store is read a few problems at a time and written meanwhile, so memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from pathlib import Path

from store.errors import StoreError, UserError
from store.export.export_forms import (
    EXPORT_FORMS,
    HF_COLUMNS,
    ExportOptions,
    ExportReport,
    Form,
    Solved,
    dpo_rows,
    hf_rows,
)
from store.format.index import Progress
from store.format.reading import chosen_teachers
from store.format.row_files import write_rows
from store.format.schema import schema_of
from store.reader import TraceStore
from store.records import Trace
from store.registry import lookup

PROBLEMS_AT_ONCE = 64
WRONG = ("mismatch", "unsimplified", "no_answer")
"""Verdicts of a response that is known to be wrong."""


def export(
    store: TraceStore, out: Path, form: str, options: ExportOptions, progress: Progress | None = None
) -> ExportReport:
    """Writes the traces to `out`, a .parquet or .jsonl file, in one of EXPORT_FORMS.

    Raises ConfigError for an unknown form, UserError when `out` exists or has another suffix, and StoreError
    for an unknown teacher, for no trace to export, or when the disk is full; nothing is left at `out` then.
    """
    out = out.absolute()
    rows_of = lookup(EXPORT_FORMS, form, key="--to")
    if out.exists() and not options.overwrite:
        raise UserError(f"--out {out} exists already; --overwrite replaces it")
    chosen_teachers(store.path, options.teachers)
    report = ExportReport(path=str(out), form=form, traces={})
    rows = (row for solved in _solved(store, rows_of, options, report, progress) for row in rows_of(solved))
    report.rows = write_rows(out, rows, schema_of(HF_COLUMNS) if rows_of is hf_rows else None)
    return report


def _solved(
    store: TraceStore, form: Form, options: ExportOptions, report: ExportReport, progress: Progress | None
) -> Iterator[Solved]:
    """Yields the problems with a trace to export, in order of arrival; counts them in the report."""
    problems, records = store.problems(), store.teachers()
    for start in range(0, len(problems), PROBLEMS_AT_ONCE):
        batch = problems[start : start + PROBLEMS_AT_ONCE]
        found = store.candidates(
            [problem.problem_id for problem in batch],
            teachers=options.teachers or None,
            usable=not options.everything and form is not dpo_rows,
        )
        for problem in batch:
            traces = _chosen(found[problem.problem_id], form, options)
            if traces:
                yield Solved(
                    index=report.problems,
                    problem=problem,
                    traces=traces,
                    teachers=records,
                    system_prompt=options.system_prompt,
                )
                report.problems += 1
                for trace in traces:
                    report.traces[trace.teacher] = report.traces.get(trace.teacher, 0) + 1
        if progress is not None:
            progress(start + len(batch), len(problems))
    if not report.problems and form is dpo_rows:
        raise StoreError(f"{store.path} has no problem with both a verified and a wrong trace")
    if not report.problems:
        raise StoreError(f"{store.path} has no trace to export; --all takes wrong and filtered ones too")


def _chosen(traces: Sequence[Trace], form: Form, options: ExportOptions) -> list[Trace]:
    """Returns a problem's traces to export. For dpo, each verified one and then a wrong one, of the same
    teacher where it has one, so that style differs little; a trace is in one pair at most."""
    if form is not dpo_rows:
        return in_turns(traces)[: options.max_per_problem]
    wrong = in_turns([t for t in traces if t.verdict in WRONG and t.finish_reason == "stop"])
    own = {trace.teacher for trace in wrong}
    right = in_turns([t for t in traces if (t.is_correct if options.everything else t.is_usable)])
    pairs: list[Trace] = []
    for chosen in sorted(right, key=lambda t: t.teacher not in own)[: options.max_per_problem]:
        if wrong:
            rejected = next((t for t in wrong if t.teacher == chosen.teacher), wrong[0])
            wrong.remove(rejected)
            pairs += [chosen, rejected]
    return pairs


def in_turns(traces: Sequence[Trace]) -> list[Trace]:
    """Returns each teacher's first trace, by name of the teacher, then each one's second, and so on."""
    ordered = sorted(traces, key=lambda trace: (trace.teacher, trace.sample_index))
    by_teacher = [list(each) for _, each in groupby(ordered, key=lambda trace: trace.teacher)]
    return [trace for turn in zip_longest(*by_teacher) for trace in turn if trace is not None]
