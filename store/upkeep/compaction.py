"""Rewriting of parts: merging small ones, and removing a teacher.

Traces of all teachers are sorted by problem, so that those of one problem are in one row group. The manifest
replaces the old parts by the new ones at one moment: before it the old ones count, after it the new. A reader
of the old ones opens the new ones by itself.
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
from store.format.index import Index, Progress, open_index, quoted, refresh_index
from store.format.manifest import PARTS, TEACHERS, PartEntry, change_parts, read_manifest
from store.format.parts import damage_named, list_parts, open_part, remove_parts, write_part
from store.format.reading import PartReader
from store.format.schema import TRACE_SCHEMA
from store.writer import StoreWriter

PART_TRACES = 2048
"""Traces of a compacted part: few enough that its footer is read within milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionReport:
    """Counts of a rewriting."""

    traces: int
    """Traces written; 0: nothing to do."""
    parts: tuple[int, int]
    """Number of parts before and after."""


def compact(
    path: str | os.PathLike[str], *, part_traces: int = PART_TRACES, progress: Progress | None = None
) -> CompactionReport:
    """Merges all parts of the store at `path` into parts of `part_traces` traces, sorted by problem.

    Readers are not disturbed. Damaged parts stay as they are, and so does a compact store.
    Raises what StoreWriter.open raises, and StoreError when the disk is full: the store is then as before.
    """
    with StoreWriter.reopen(path) as writer, open_index(writer.path) as index:
        parts = [row["part"] for row in index.rows("SELECT part FROM idx.parts WHERE error IS NULL")]
        if _is_compact(parts, index, part_traces):
            return CompactionReport(traces=0, parts=(len(parts), len(parts)))
        return _rewrite(writer.path, index, parts, "true", part_traces, progress)


def forget(
    path: str | os.PathLike[str], teacher: str, *, failed: bool = False, progress: Progress | None = None
) -> CompactionReport:
    """Removes every trace of a teacher, and its record; parts with traces of others are rewritten without.

    `failed`: only its failed samples, so that they are tried again.
    Raises StoreError for an unknown teacher, else what `compact` raises.
    """
    with StoreWriter.reopen(path) as writer, open_index(writer.path) as index:
        record = writer.path / TEACHERS / f"{teacher}.json"
        # From the manifest: a part whose traces are all in another part too has no row in the index.
        damaged = {broken.part for broken in index.damaged()}
        entries = read_manifest(writer.path).parts
        parts = [part for part, entry in entries.items() if teacher in entry.traces and part not in damaged]
        if not parts and not record.exists():
            known = ", ".join(sorted(file.stem for file in record.parent.glob("*.json"))) or "none"
            raise StoreError(f"no teacher {teacher!r} in {writer.path}; its teachers: {known}")
        listed = ", ".join(map(quoted, parts)) or "NULL"
        gone = f"teacher = {quoted(teacher)}" + (" AND finish_reason = 'error'" if failed else "")
        others = f"part IN ({listed}) AND NOT ({gone})"
        report = _rewrite(writer.path, index, parts, others, PART_TRACES, progress)
        if not failed:
            with disk_errors_named(record):
                record.unlink(missing_ok=True)
        return report


def _is_compact(parts: Sequence[str], index: Index, part_traces: int) -> bool:
    """Returns whether the parts do not overlap and are no more than necessary."""
    rows = index.rows(
        """SELECT min(problem) AS low, max(problem) AS high, count(*) AS traces
           FROM idx.rows GROUP BY part ORDER BY low"""
    )
    overlap = any(left["high"] >= right["low"] for left, right in pairwise(rows))
    traces = sum(row["traces"] for row in rows)
    return not overlap and len(rows) == len(parts) <= traces // part_traces + 1


def _rewrite(
    root: Path, index: Index, parts: Sequence[str], chosen: str, part_traces: int, progress: Progress | None
) -> CompactionReport:
    """Rewrites the traces for which the SQL condition `chosen` is true, then removes their `parts`."""
    before = len(list_parts(root))
    total = index.rows(f"SELECT count(*) AS traces FROM idx.rows WHERE {chosen}")[0]["traces"]
    written = 0
    with closing(PartReader(root)) as reader, new_parts(root) as new:
        for condition in _ranges(index, chosen, part_traces):
            rows = index.rows(f"SELECT part, row_group, row FROM idx.rows WHERE {condition}")
            part, entry = write_part(root, reader.table(rows, TRACE_SCHEMA.names))
            new[part] = entry
            written += len(rows)
            if progress is not None:
                progress(written, total)
    swap_parts(root, old=parts, new=new)
    return CompactionReport(traces=written, parts=(before, len(list_parts(root))))


@contextmanager
def new_parts(root: Path) -> Iterator[dict[str, PartEntry]]:
    """Collects parts that are written before any of them counts, and removes them when the block fails."""
    new: dict[str, PartEntry] = {}
    try:
        yield new
    except BaseException:
        remove_parts(root, new)
        raise


def swap_parts(root: Path, *, old: Sequence[str], new: Mapping[str, PartEntry]) -> None:
    """Replaces parts by others that are already written, and removes their files. Raises StoreError."""
    gone = [part for part in old if part not in new]
    change_parts(root, add=new, drop=gone)
    remove_parts(root, gone)
    refresh_index(root)


def rewrite_parts(
    root: Path,
    parts: Mapping[str, PartEntry],
    change: Callable[[pa.Table], pa.Table | None],
    progress: Progress,
) -> None:
    """Replaces each of the parts by what `change` makes of its rows, all at one moment; None leaves a part.

    Raises StoreDamagedError for a part that cannot be read, StoreError for a full disk.
    """
    old, seen, total = [], 0, sum(sum(entry.traces.values()) for entry in parts.values())
    with new_parts(root) as new:
        for part, entry in parts.items():
            path = root / PARTS / part
            with damage_named(path), open_part(path) as file:
                table = file.read(use_threads=False)
            if (changed := change(table)) is not None:
                name, new[name] = write_part(root, changed)
                old.append(part)
            seen += sum(entry.traces.values())
            progress(seen, total)
    swap_parts(root, old=old, new=new)


def _ranges(index: Index, chosen: str, part_traces: int) -> Iterator[str]:
    """Yields SQL conditions that split the chosen rows between problems into about `part_traces` each."""
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
