"""The part files: written whole, listed by name, read a few row groups at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreDamagedError
from store.files import whole_file
from store.manifest import PARTS
from store.records import Trace, content_hash
from store.schema import PARQUET_OPTIONS, TOKEN_COLUMNS, TRACE_SCHEMA, trace_of, traces_table

OPEN_PARTS = 128
"""Parts whose footers stay in memory, at about 0.6 MB for 512 traces."""

READ_ERRORS = (OSError, ValueError, TypeError, pa.ArrowException)
"""What a cut or altered Parquet file raises, by the place where it was hit."""

TEXT_COLUMNS = [name for name in TRACE_SCHEMA.names if name not in TOKEN_COLUMNS]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStamp:
    """What tells a part from an altered one without reading it."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedPart:
    """A part that cannot be read; the store does without it."""

    part: str
    """Its path below `parts/`."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where one trace lies."""

    part: str
    row_group: int
    row: int
    """0-based within the row group."""


def write_part(root: Path, traces: Sequence[Trace]) -> Path:
    """One part with the traces of one teacher, sorted by problem; it appears whole or not at all."""
    ordered = sorted(traces, key=lambda trace: (trace.problem_id, trace.sample_index))
    directory = root / PARTS / ordered[0].teacher
    fingerprint = content_hash(*(trace.trace_id for trace in ordered))[:8]
    path = directory / f"part-{_next_number(directory):06d}-{fingerprint}.parquet"
    table = traces_table(ordered)
    with whole_file(path) as file:
        pq.write_table(table, file, **PARQUET_OPTIONS)
    return path


def _next_number(directory: Path) -> int:
    numbers = [name.stem.split("-")[1] for name in directory.glob("part-*.parquet")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1


def list_parts(root: Path) -> dict[str, PartStamp]:
    """Every whole part, by its path below `parts/`, in order of the path."""
    stamps: dict[str, PartStamp] = {}
    for path in sorted((root / PARTS).glob("*/part-*.parquet")):
        with suppress(FileNotFoundError):  # removed since it was listed
            stat = path.stat()
            stamp = PartStamp(size=stat.st_size, mtime_ns=stat.st_mtime_ns)
            stamps[f"{path.parent.name}/{path.name}"] = stamp
    return stamps


def open_part(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """The part for reading; page checksums are verified. Raises one of READ_ERRORS."""
    return pq.ParquetFile(path, metadata=metadata, pre_buffer=False, page_checksum_verification=True)


class PartReader:
    """Reads single traces out of parts, and keeps the footers of the parts last used."""

    def __init__(self, root: Path) -> None:
        self._parts = root / PARTS
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    def read(self, locations: Sequence[Location], *, tokens: bool) -> list[Trace]:
        """The traces at the locations, in their order. Raises StoreDamagedError, naming the part."""
        by_part: dict[str, list[Location]] = {}
        for location in locations:
            by_part.setdefault(location.part, []).append(location)
        found: dict[Location, Trace] = {}
        for part, wanted in by_part.items():
            with damage_named(self._parts / part):
                rows = self._rows(part, wanted, list(TRACE_SCHEMA.names) if tokens else TEXT_COLUMNS)
                found.update(zip(wanted, map(trace_of, rows), strict=True))
        return [found[location] for location in locations]

    def _rows(
        self, part: str, wanted: Sequence[Location], columns: Sequence[str]
    ) -> Sequence[Mapping[str, Any]]:
        file = self._file(part)
        groups = sorted({location.row_group for location in wanted})
        table = file.read_row_groups(groups, columns=columns, use_threads=False)
        starts, start = {}, 0
        for group in groups:
            starts[group] = start
            start += file.metadata.row_group(group).num_rows
        rows: Sequence[Mapping[str, Any]] = table.take(
            [starts[location.row_group] + location.row for location in wanted]
        ).to_pylist()
        return rows

    def _file(self, part: str) -> pq.ParquetFile:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        file = self._open[part] = open_part(self._parts / part)
        if len(self._open) > OPEN_PARTS:
            self._open.popitem(last=False)[1].close()
        return file

    def close(self) -> None:
        """Closes every open part."""
        for file in self._open.values():
            file.close()
        self._open.clear()


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns what a broken Parquet file raises into a StoreDamagedError that names it and the way out."""
    try:
        yield
    except READ_ERRORS as error:
        raise StoreDamagedError(
            f"{path} cannot be read: {one_line(error)}; remove it and run `ampo precompute teachers` again"
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
