"""`ampo store export`: a store's traces in the forms that other programs read. Whole, or not there.

The store is read a few problems at a time and written as it is read, so memory does not grow with it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreError, UserError
from store.export.data_card import data_card
from store.export.export_forms import FORMS, Form, Solved
from store.format.files import TMP_MARK, disk_errors_named, sync, whole_file
from store.reader import TraceStore
from store.records import Problem, Trace

PROBLEMS_AT_ONCE = 64
ROWS_AT_ONCE = 256
"""Rows of a Parquet row group."""
SHARD_BYTES = 256 * 2**20
"""Characters of text, about, after which a data set's next file begins."""

Progress = Callable[[int, int], None]
"""Called with (problems done, problems in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is exported."""

    everything: bool = False
    """Wrong and filtered traces too; otherwise those alone that may guide a student."""
    teachers: tuple[str, ...] = ()
    """Empty: all."""
    max_per_problem: int | None = None
    """The teachers take turns: the first trace of each, then the second."""
    system_prompt: str | None = None
    """In the place of every system turn; None: the problem's (chat: the teacher's), empty: none."""
    license: str = "unknown"
    """For a data set's card."""
    overwrite: bool = False


@dataclass(slots=True, kw_only=True)
class ExportReport:
    """What was written."""

    path: str
    form: str
    problems: int = 0
    """With at least one trace."""
    rows: int = 0
    traces: dict[str, int]
    """By teacher."""
    bytes: int = 0

    @property
    def line(self) -> str:
        """All of it in one line."""
        teachers = ", ".join(f"{name} {count:,}" for name, count in sorted(self.traces.items()))
        return (
            f"wrote {self.path}: {self.form}, {self.rows:,} rows, {self.problems:,} problems, "
            f"{sum(self.traces.values()):,} traces ({teachers}), {self.bytes / 2**20:.1f} MiB"
        )


def export(
    store: TraceStore, out: Path, form: str, options: ExportOptions, progress: Progress | None = None
) -> ExportReport:
    """Writes the traces to `out` in one of FORMS: a .parquet or .jsonl file, for `hf` a directory.

    Raises UserError when `out` is there or has another suffix, and StoreError for a teacher that the store
    has not, for nothing to export, or when the disk does not take it; nothing is left at `out` then.
    """
    out = out.absolute()
    check_out(out, form, overwrite=options.overwrite)
    known = store.teachers()
    for name in options.teachers:
        if name not in known:
            raise StoreError(f"--teacher {name}: {store.path} has {', '.join(known) or 'no teacher'}")
    report = ExportReport(path=str(out), form=form, traces={})
    solved = _counted(_solved(store, options, progress), report)
    if form == "hf":
        _write_directory(out, solved, store, options, report)
        report.bytes = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    else:
        with whole_file(out) as file:
            report.rows = WRITERS[out.suffix](file, FORMS[form], solved)
            _refuse_nothing(report, store)
        report.bytes = out.stat().st_size
    return report


def check_out(out: Path, form: str, *, overwrite: bool) -> None:
    """UserError when the form cannot be written there."""
    if form not in FORMS:
        raise UserError(f"--to {form}: one of {', '.join(FORMS)}")
    if form != "hf" and out.suffix not in WRITERS:
        raise UserError(f"--out {out}: {form} needs a file that ends in {' or '.join(WRITERS)}")
    if form == "hf" and out.suffix in WRITERS:
        raise UserError(f"--out {out}: hf makes a directory, not a {out.suffix} file")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"--out {out} is there already; --overwrite replaces it")
    if form == "hf" and not _is_ours(out):
        raise UserError(f"--out {out} holds something else than a data set of ours; name another directory")
    if form != "hf" and not out.is_file():
        raise UserError(f"--out {out} is a directory; {form} makes a file")


def _is_ours(directory: Path) -> bool:
    """A directory that --overwrite may throw away: empty, or with nothing but what an export makes."""
    if not directory.is_dir():
        return False
    names = {entry.name for entry in directory.iterdir()}
    data = [file.name for file in (directory / "data").glob("*")]
    return names <= {"README.md", "data"} and all(name.startswith("train-") for name in data)


def _solved(store: TraceStore, options: ExportOptions, progress: Progress | None) -> Iterator[Solved]:
    """The problems that have a trace to export, in order of arrival."""
    problems, records, index = store.problems(), store.teachers(), 0
    for start in range(0, len(problems), PROBLEMS_AT_ONCE):
        part = problems[start : start + PROBLEMS_AT_ONCE]
        found = _traces(store, part, options)
        for problem in part:
            traces = in_turns(found[problem.problem_id])[: options.max_per_problem]
            if traces:
                yield Solved(
                    index=index,
                    problem=problem,
                    traces=traces,
                    teachers=records,
                    system_prompt=options.system_prompt,
                )
                index += 1
        if progress is not None:
            progress(start + len(part), len(problems))


def _traces(store: TraceStore, problems: Sequence[Problem], options: ExportOptions) -> dict[str, list[Trace]]:
    ids = [problem.problem_id for problem in problems]
    fetch = store.of_problems if options.everything else store.candidates
    return fetch(ids, teachers=options.teachers or None)


def in_turns(traces: Sequence[Trace]) -> list[Trace]:
    """Each teacher's first trace, by name of the teacher, then each one's second, and so on."""
    seen: Counter[str] = Counter()
    ranked = []
    for trace in sorted(traces, key=lambda trace: (trace.teacher, trace.sample_index)):
        ranked.append((seen[trace.teacher], trace))
        seen[trace.teacher] += 1
    return [trace for _, trace in sorted(ranked, key=lambda pair: (pair[0], pair[1].teacher))]


def _counted(solved: Iterator[Solved], report: ExportReport) -> Iterator[Solved]:
    for one in solved:
        report.problems += 1
        for trace in one.traces:
            report.traces[trace.teacher] = report.traces.get(trace.teacher, 0) + 1
        yield one


def _refuse_nothing(report: ExportReport, store: TraceStore) -> None:
    if not report.problems:
        raise StoreError(f"{store.path} has no trace to export; --all takes wrong and filtered ones too")


def _write_parquet(file: BinaryIO, form: Form, solved: Iterator[Solved]) -> int:
    rows = (row for one in solved for row in form.rows(one))
    written = 0
    with pq.ParquetWriter(file, form.schema, compression="zstd") as writer:
        while part := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, form.schema))
            written += len(part)
    return written


def _write_jsonl(file: BinaryIO, form: Form, solved: Iterator[Solved]) -> int:
    written = 0
    for one in solved:
        for row in form.rows(one):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            written += 1
    return written


WRITERS: dict[str, Callable[[BinaryIO, Form, Iterator[Solved]], int]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
}
"""By the suffix of `--out`; each returns the rows written."""


def _write_directory(
    out: Path, solved: Iterator[Solved], store: TraceStore, options: ExportOptions, report: ExportReport
) -> None:
    """Made aside and renamed; what was there goes only when the new one is whole."""
    aside = out.with_name(f"{TMP_MARK}{out.name}")
    before = out.with_name(f"{TMP_MARK}before-{out.name}")
    with ExitStack() as cleanup:
        for leftover in (aside, before):
            shutil.rmtree(leftover, ignore_errors=True)
            cleanup.callback(shutil.rmtree, leftover, ignore_errors=True)
        with disk_errors_named(out):
            (aside / "data").mkdir(parents=True)
            report.rows = _write_shards(aside / "data", solved)
            _refuse_nothing(report, store)
            (aside / "README.md").write_text(data_card(store, options, report), encoding="utf-8")
            if out.exists():
                out.rename(before)
            aside.rename(out)
            sync(out.parent)


def _write_shards(directory: Path, solved: Iterator[Solved]) -> int:
    """`train-00000-of-00002.parquet` and so on; returns the rows."""
    paths: list[Path] = []
    rows = 0
    while (first := next(solved, None)) is not None:
        path = directory / f"{len(paths)}.parquet"
        with path.open("wb") as file:
            rows += _write_parquet(file, FORMS["hf"], _one_shard(first, solved))
            file.flush()
        sync(path)
        paths.append(path)
    for number, path in enumerate(paths):
        path.rename(directory / f"train-{number:05d}-of-{len(paths):05d}.parquet")
    return rows


def _one_shard(first: Solved, rest: Iterator[Solved]) -> Iterator[Solved]:
    size, one = 0, first
    while True:
        yield one
        size += sum(len(trace.text) + len(one.problem.question) for trace in one.traces)
        following = next(rest, None) if size < SHARD_BYTES else None
        if following is None:
            return
        one = following
