"""The part files: written whole, listed by name. store/format/reading.py reads single traces."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreDamagedError
from store.format.columns import BIG_COLUMNS
from store.format.files import disk_errors_named, whole_file
from store.format.manifest import PARTS, PartEntry
from store.format.schema import PART_OPTIONS, TRACE_SCHEMA

ALL = "all"
"""Directory of compacted parts, with traces of several teachers; no teacher may have this name."""

READ_ERRORS = (OSError, ValueError, TypeError, pa.ArrowException)
"""The exceptions of truncated and altered Parquet files."""

_DIGEST = re.compile(r"[0-9a-f]{16}")

SMALL_COLUMNS = [name for name in TRACE_SCHEMA.names if name not in BIG_COLUMNS]


class PartStamp(NamedTuple):
    """Size and time of a part: they differ in an altered one."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedPart:
    """A part that cannot be read and is left out."""

    part: str
    """Its path below `parts/`."""
    reason: str


def write_part(root: Path, table: pa.Table) -> tuple[str, PartEntry]:
    """Writes one part with rows of TRACE_SCHEMA, sorted by problem, teacher and sample.

    It appears whole or not at all. Returns its path below `parts/` and its entry for the manifest.
    """
    table = table.sort_by([(name, "ascending") for name in ("problem_id", "teacher", "sample_index")])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **PART_OPTIONS)
    content = sink.getvalue()
    digest = blake2b(content, digest_size=16).hexdigest()
    entry = _entry(content.size, digest, table)
    directory = next(iter(entry.traces)) if len(entry.traces) == 1 else ALL
    part = f"{directory}/part-{_next_number(root / PARTS / directory):06d}-{digest[:16]}.parquet"
    with whole_file(root / PARTS / part) as file:
        file.write(content)
    return part, entry


def entry_of(path: Path) -> PartEntry:
    """Returns the manifest's entry for a file, from its content. Raises one of READ_ERRORS."""
    digest = file_digest(path)
    with open_part(path) as file:
        table = file.read(columns=["teacher", "is_correct"], use_threads=False)
    return _entry(path.stat().st_size, digest, table)


def _entry(size: int, digest: str, table: pa.Table) -> PartEntry:
    verified = table.filter(table["is_correct"])
    return PartEntry(
        bytes=size, blake2b=digest, traces=_counts(table["teacher"]), verified=_counts(verified["teacher"])
    )


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Returns value -> occurrences, sorted by value."""
    return dict(sorted(Counter(column.to_pylist()).items()))


def file_digest(path: Path) -> str:
    """Returns 32 hex digits of blake2b over a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def check_digest(path: Path) -> None:
    """Raises ValueError when a part's bytes differ from the checksum in its name; a name without one passes.

    The footer and the headers of pages have no other checksum.
    """
    expected = digest_in_name(path.name)
    if _DIGEST.fullmatch(expected) and not file_digest(path).startswith(expected):
        raise ValueError("its checksum is not the one in its name")


def digest_in_name(part: str) -> str:
    """Returns the beginning of the checksum in a part's name."""
    return part.removesuffix(".parquet").rpartition("-")[2]


def _next_number(directory: Path) -> int:
    numbers = [name.stem.split("-")[1] for name in directory.glob("part-*.parquet")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1


def remove_parts(root: Path, parts: Iterable[str]) -> None:
    """Removes part files, if they exist. Raises StoreError."""
    for part in parts:
        with disk_errors_named(root / PARTS / part):
            (root / PARTS / part).unlink(missing_ok=True)


def list_parts(root: Path) -> dict[str, PartStamp]:
    """Returns every renamed part, by its path below `parts/`, in order of the path."""
    # A listing reads one directory after the other. A compaction in between may hide the new part in the
    # first and the old one in the second.
    before, now = _listed(root), _listed(root)
    while before.keys() - now.keys():
        before, now = now, _listed(root)
    return now


def _listed(root: Path) -> dict[str, PartStamp]:
    stamps: dict[str, PartStamp] = {}
    for path in sorted((root / PARTS).glob("*/part-*.parquet")):
        with suppress(FileNotFoundError):  # removed since it was listed
            stat = path.stat()
            stamps[f"{path.parent.name}/{path.name}"] = PartStamp(stat.st_size, stat.st_mtime_ns)
    return stamps


def open_part(path: Path) -> pq.ParquetFile:
    """Opens a part; page checksums are verified. Raises one of READ_ERRORS."""
    return pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)


def part_rows(path: Path) -> pa.Table:
    """Returns the part's columns but for the big ones, and each row's `row_group` and `row` in that group.

    Raises one of READ_ERRORS.
    """
    with open_part(path) as file:
        if not set(TRACE_SCHEMA.names) <= set(file.schema_arrow.names):
            raise ValueError("its columns are not those of a trace")
        table = file.read(columns=SMALL_COLUMNS, use_threads=False)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.concatenate([np.arange(size, dtype=np.int32) for size in [0, *sizes]])
    return table.append_column("row_group", pa.array(groups)).append_column("row", pa.array(rows))


CHECK = "`ampo store check --repair` moves it away and names the command that samples its traces again"


@contextmanager
def damage_named(path: Path, way_out: str = CHECK) -> Iterator[None]:
    """Turns READ_ERRORS of the block into a StoreDamagedError that names the file and the way out;
    FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        raise StoreDamagedError(f"{path} cannot be read: {one_line(error)}; {way_out}") from error


def one_line(error: BaseException) -> str:
    """Returns the first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
