"""`ampo store export`: a store's traces in other programs' forms. The output appears whole or not at all.

The store is read a few problems at a time and written meanwhile, so memory does not grow with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreError, UserError
from store.export.data_card import data_card
from store.export.export_forms import (
    EXPORT_FORMS,
    HF_COLUMNS,
    ExportOptions,
    ExportReport,
    Form,
    Solved,
    hf_rows,
)
from store.format.files import TMP_MARK, disk_errors_named, sync, whole_file
from store.format.parts import one_line
from store.format.schema import schema_of
from store.reader import TraceStore
from store.records import Trace
from store.registry import lookup

PROBLEMS_AT_ONCE = 64
ROWS_AT_ONCE = 256
"""Rows of a Parquet row group."""

DATA_FILE = "data/train.parquet"
"""The traces below a directory of the form `hf`."""

Rows = Iterator[dict[str, Any]]
Progress = Callable[[int, int], None]
"""Called with (problems done, all problems)."""


def export(
    store: TraceStore, out: Path, form: str, options: ExportOptions, progress: Progress | None = None
) -> ExportReport:
    """Writes the traces to `out` in one of EXPORT_FORMS: a .parquet or .jsonl file, for `hf` a directory.

    Raises ConfigError for an unknown form, UserError when `out` exists or has another suffix, and StoreError
    for an unknown teacher, for no trace to export, or when the disk is full; nothing is left at `out` then.
    """
    out = out.absolute()
    rows_of = check_out(out, form, overwrite=options.overwrite)
    known = store.teachers()
    for name in options.teachers:
        if name not in known:
            raise StoreError(f"--teacher {name}: {store.path} has {', '.join(known) or 'no teacher'}")
    report = ExportReport(path=str(out), form=form, traces={})
    rows = (row for solved in _solved(store, options, report, progress) for row in rows_of(solved))
    if rows_of is hf_rows:
        _write_directory(out, rows, store, options, report)
    else:
        with whole_file(out) as file:
            report.rows = WRITERS[out.suffix](file, rows, form)
            _refuse_nothing(report, store)
    return report


def check_out(out: Path, form: str, *, overwrite: bool) -> Form:
    """Returns the form's function. Raises ConfigError for an unknown form, UserError where it cannot be
    written to `out`."""
    rows_of = lookup(EXPORT_FORMS, form, key="--to")
    is_directory = rows_of is hf_rows
    if is_directory == (out.suffix in WRITERS):
        kind = "directory" if is_directory else f"file that ends in {' or '.join(WRITERS)}"
        raise UserError(f"--out {out}: {form} makes a {kind}")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists already; --overwrite replaces it")
    if out.exists() and not (_is_export(out) if is_directory else out.is_file()):
        raise UserError(f"--out {out} is no output of this command; name another path")
    return rows_of


def _is_export(out: Path) -> bool:
    """Returns whether --overwrite may remove the directory: it holds nothing but the files of an export."""
    files = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    return out.is_dir() and files <= {"README.md", DATA_FILE}


def _solved(
    store: TraceStore, options: ExportOptions, report: ExportReport, progress: Progress | None
) -> Iterator[Solved]:
    """Yields the problems with a trace to export, in order of arrival; counts them in the report."""
    problems, records = store.problems(), store.teachers()
    for start in range(0, len(problems), PROBLEMS_AT_ONCE):
        batch = problems[start : start + PROBLEMS_AT_ONCE]
        found = store.candidates(
            [problem.problem_id for problem in batch],
            teachers=options.teachers or None,
            usable=not options.everything,
        )
        for problem in batch:
            traces = in_turns(found[problem.problem_id])[: options.max_per_problem]
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


def in_turns(traces: Sequence[Trace]) -> list[Trace]:
    """Returns each teacher's first trace, by name of the teacher, then each one's second, and so on."""
    ordered = sorted(traces, key=lambda trace: (trace.teacher, trace.sample_index))
    by_teacher = [list(each) for _, each in groupby(ordered, key=lambda trace: trace.teacher)]
    return [trace for turn in zip_longest(*by_teacher) for trace in turn if trace is not None]


def _refuse_nothing(report: ExportReport, store: TraceStore) -> None:
    if not report.problems:
        raise StoreError(f"{store.path} has no trace to export; --all takes wrong and filtered ones too")


def write_parquet(file: BinaryIO, rows: Rows, form: str, schema: pa.Schema | None = None) -> int:
    """Writes rows as Parquet, by default in the schema of the first ones; returns their number."""
    written = 0
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            try:
                table = pa.Table.from_pylist(batch, schema)
            except pa.ArrowException as error:
                raise UserError(f"--to {form}: rows of different types: {one_line(error)}") from error
            if writer is None:
                schema = table.schema
                writer = stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
            writer.write_table(table)
            written += len(batch)
    return written


def write_jsonl(file: BinaryIO, rows: Rows, form: str) -> int:
    """Writes one line a row; returns their number."""
    written = 0
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        written += 1
    return written


WRITERS: dict[str, Callable[[BinaryIO, Rows, str], int]] = {".parquet": write_parquet, ".jsonl": write_jsonl}
"""By the suffix of `--out`."""


def _write_directory(
    out: Path, rows: Rows, store: TraceStore, options: ExportOptions, report: ExportReport
) -> None:
    """Writes a directory aside and renames it."""
    aside = out.with_name(f"{TMP_MARK}{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with disk_errors_named(out):
            with whole_file(aside / DATA_FILE) as file:
                report.rows = write_parquet(file, rows, "hf", schema_of(HF_COLUMNS))
                _refuse_nothing(report, store)
            (aside / "README.md").write_text(data_card(store, options, report), encoding="utf-8")
            if out.exists():
                shutil.rmtree(out)
            aside.rename(out)
            sync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
