"""Rewriting parts: merging small ones, and leaving a teacher out.

Traces are written anew in order of problem, those of all teachers together, so that whoever asks for a
problem finds its traces in one page. The new parts are entered in the manifest at the same moment at which
the old ones are struck out; before it the old ones count, after it the new. A reader that still knows the old
ones takes up the new ones by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from store.errors import StoreError
from store.format.files import disk_errors_named
from store.format.index import Index, open_index, quoted, refresh_index
from store.format.manifest import TEACHERS, PartEntry, change_parts, read_manifest
from store.format.part_reader import PartReader
from store.format.parts import list_parts, remove_parts, write_part
from store.format.schema import TRACE_SCHEMA
from store.writer import StoreWriter

PART_TRACES = 2048
"""Traces of a compacted part: few enough that its footer is read within milliseconds."""

Progress = Callable[[int, int], None]
"""Called with (traces written, traces in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionReport:
    """What a rewriting did."""

    traces: int
    """Written anew; 0 when nothing was to be done."""
    parts_before: int
    parts_after: int
    bytes_before: int
    bytes_after: int
    """Of the parts."""


def compact(
    path: str | os.PathLike[str], *, part_traces: int = PART_TRACES, progress: Progress | None = None
) -> CompactionReport:
    """Merges all parts of the store at `path` into parts of `part_traces` traces, sorted by problem.

    Readers go on reading. Damaged parts stay as they are. A store that is compact by now is left alone.
    Raises what StoreWriter.open raises, and StoreError when the disk is full: the store is then as before.
    """
    with StoreWriter.reopen(path) as writer, open_index(writer.path) as index:
        parts = [row["part"] for row in index.rows("SELECT part FROM idx.parts WHERE error IS NULL")]
        if _is_compact(parts, index, part_traces):
            return _report(writer.path, before=_sizes(writer.path), traces=0)
        return _rewrite(writer.path, index, parts, "true", part_traces, progress)


def forget(
    path: str | os.PathLike[str], teacher: str, *, progress: Progress | None = None
) -> CompactionReport:
    """Removes every trace of a teacher, and its record; parts with others' traces are rewritten without.

    Raises StoreError for a teacher that the store does not know, else what `compact` raises.
    """
    with StoreWriter.reopen(path) as writer, open_index(writer.path) as index:
        record = writer.path / TEACHERS / f"{teacher}.json"
        # The index does not tell: a part whose traces all stand in another too has no row in it.
        damaged = {broken.part for broken in index.damaged()}
        entries = read_manifest(writer.path).parts
        parts = [part for part, entry in entries.items() if teacher in entry.traces and part not in damaged]
        if not parts and not record.exists():
            known = ", ".join(sorted(file.stem for file in record.parent.glob("*.json"))) or "none"
            raise StoreError(f"no teacher {teacher!r} in {writer.path}; its teachers: {known}")
        index.add_table("parts_of_teacher", pa.table({"part": pa.array(parts, pa.string())}))
        others = f"part IN (SELECT part FROM parts_of_teacher) AND teacher <> {quoted(teacher)}"
        report = _rewrite(writer.path, index, parts, others, PART_TRACES, progress)
        with disk_errors_named(record):
            record.unlink(missing_ok=True)
        return report


def _is_compact(parts: Sequence[str], index: Index, part_traces: int) -> bool:
    """In parts that do not overlap, and no more of them than need be."""
    rows = index.rows(
        "SELECT min(problem) AS low, max(problem) AS high FROM idx.rows GROUP BY part ORDER BY low"
    )
    overlap = any(left["high"] >= right["low"] for left, right in pairwise(rows))
    traces = index.rows("SELECT count(*) AS traces FROM idx.rows")[0]["traces"]
    return not overlap and len(rows) == len(parts) <= traces // part_traces + 1


def _rewrite(
    root: Path, index: Index, parts: Sequence[str], chosen: str, part_traces: int, progress: Progress | None
) -> CompactionReport:
    """Writes the traces for which the SQL condition `chosen` holds anew, then drops their `parts`."""
    before = _sizes(root)
    total = index.rows(f"SELECT count(*) AS traces FROM idx.rows WHERE {chosen}")[0]["traces"]
    written = 0
    with closing(PartReader(root)) as reader, new_parts(root) as new:
        for condition in _ranges(index, chosen, part_traces):
            rows = index.rows(f"SELECT part, row_group, row FROM idx.rows WHERE {condition}")
            table = reader.table(rows, TRACE_SCHEMA.names)
            part, entry = write_part(root, table)
            new[part] = entry
            written += table.num_rows
            if progress is not None:
                progress(written, total)
    swap_parts(root, old=parts, new=new)
    return _report(root, before=before, traces=written)


@contextmanager
def new_parts(root: Path) -> Iterator[dict[str, PartEntry]]:
    """For parts that are written before any of them counts: all are removed when the block does not end."""
    new: dict[str, PartEntry] = {}
    try:
        yield new
    except BaseException:
        remove_parts(root, new)
        raise


def swap_parts(root: Path, *, old: Sequence[str], new: Mapping[str, PartEntry]) -> None:
    """Puts parts that are written by now in the place of others, whose files go. Raises StoreError."""
    gone = [part for part in old if part not in new]
    change_parts(root, add=new, drop=gone)
    remove_parts(root, gone)
    refresh_index(root)


def _ranges(index: Index, chosen: str, part_traces: int) -> Iterator[str]:
    """SQL conditions that cut the chosen rows by problem into about `part_traces` each; a problem is never
    cut in two."""
    rows = index.rows(
        f"""SELECT max(problem) AS last FROM (
                SELECT problem, (sum(count(*)) OVER (ORDER BY problem) - 1) // {part_traces} AS chunk
                FROM idx.rows WHERE {chosen} GROUP BY problem)
            GROUP BY chunk ORDER BY last"""
    )
    low = -1
    for row in rows:
        yield f"{chosen} AND problem > {low} AND problem <= {row['last']}"
        low = row["last"]


def _sizes(root: Path) -> tuple[int, int]:
    stamps = list_parts(root)
    return len(stamps), sum(stamp.size for stamp in stamps.values())


def _report(root: Path, *, before: tuple[int, int], traces: int) -> CompactionReport:
    after = _sizes(root)
    return CompactionReport(
        traces=traces,
        parts_before=before[0],
        parts_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
    )
