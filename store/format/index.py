"""The disposable index: every small column of every trace, and its row group in its part.

    traces(trace_id, problem_id, teacher, sample_index, verdict, is_correct, filtered, is_usable, ...)
    parts(part, size, mtime_ns, rows, error)       error: why a part could not be read; null for a whole one

It is built aside, renamed, and opened only for reading, so that DuckDB's rule of one writer or many readers
affects nobody. A store that cannot be written gets its index in memory.

`traces` is a view of `rows`, where ids are sorted numbers in row groups so small that their minima and maxima
let DuckDB skip nearly all of two million rows when 64 problems are queried.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

from store.errors import StoreDamagedError, StoreError
from store.format.columns import BIG_COLUMNS, PART_COLUMNS, TRACE_COLUMNS
from store.format.files import INDEX_LOCK, FileLock
from store.format.manifest import INDEX, PARTS, read_manifest
from store.format.parts import (
    READ_ERRORS,
    DamagedPart,
    PartStamp,
    check_digest,
    list_parts,
    one_line,
    part_rows,
)

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""

BUILDING = ".building-index.duckdb"
"""Its name while it is built; the index lock is held, so one is enough."""

REBUILDS = 5
"""Attempts at indexing parts that are being replaced."""

WAY_OUT = "make it again with `ampo store reindex`"

ROW_GROUP_ROWS = 2048
"""DuckDB's smallest: a look-up scans one row group of the index for each problem."""

_NUMBERS = ("trace_id", "problem_id", "created_at")
"""Columns that are numbers in the index: `trace`, `problem`, `created_us`."""

_PLAIN = [column for column in TRACE_COLUMNS if column.name not in (*_NUMBERS, *BIG_COLUMNS)]

PLAIN_COLUMNS = [column.name for column in _PLAIN]
"""Columns that the index holds as they are in a part."""

ROW_COLUMNS = ["problem", "trace", "created_us", *PLAIN_COLUMNS, "part", "row_group", "row"]
"""Columns of `idx.rows`: all that store.format.part_reader needs of a trace."""

_PART_COLUMNS = ", ".join(f"{column.name} {column.kind}" for column in PART_COLUMNS)

_TABLES = f"""
    CREATE TABLE idx.parts ({_PART_COLUMNS});
    CREATE TABLE idx.rows (problem UBIGINT, trace UBIGINT, created_us BIGINT,
        {", ".join(f"{column.name} {column.kind}" for column in _PLAIN)},
        part VARCHAR, row_group INTEGER, row INTEGER);
    CREATE VIEW idx.traces AS SELECT lower(lpad(to_hex(trace), 16, '0')) AS trace_id,
        lower(lpad(to_hex(problem), 16, '0')) AS problem_id, is_correct AND filtered IS NULL AS is_usable,
        make_timestamp(created_us) AS created_at, * EXCLUDE (trace, problem, created_us) FROM idx.rows;
    CREATE TEMP TABLE found AS FROM idx.rows;
"""

# A trace is in two parts where parts were copied in by hand, and while compacted parts replace old ones: the
# row of the compacted, then of the newest part counts.
_SORT = """
    INSERT INTO idx.rows FROM found
    QUALIFY row_number() OVER (PARTITION BY problem, teacher, sample_index
                               ORDER BY starts_with(part, 'all/') DESC, part DESC, row_group, row) = 1
    ORDER BY problem, teacher, sample_index
"""

# A part that lost a doubled trace is read again: the part with the other one may be gone.
_REUSABLE = """
    SELECT part, size, mtime_ns FROM old.parts AS p
    WHERE error IS NULL AND rows = (SELECT count(*) FROM old.rows AS t WHERE t.part = p.part)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """Counts of an indexing."""

    parts: int
    """Whole parts."""
    traces: int
    damaged: tuple[DamagedPart, ...]
    seconds: float


class Index:
    """An index opened for reading."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str) -> None:
        self.connection = connection
        self.name = name

    def rows(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[dict[str, Any]]:
        """Returns the rows of a query over `idx.traces` and `idx.parts`, each as column -> value.

        Raises StoreDamagedError when the index file is broken.
        """
        try:
            result = self.connection.execute(sql, parameters)
            names = [column[0] for column in result.description or ()]
            return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
        except duckdb.ProgrammingError:
            raise
        except duckdb.Error as error:
            raise StoreDamagedError(f"{self.name} is broken: {one_line(error)}; {WAY_OUT}") from error

    def add_table(self, name: str, table: pa.Table) -> None:
        """Lets queries read an Arrow table under a name."""
        self.connection.register(name, table)

    def stamps(self) -> dict[str, PartStamp]:
        """Returns size and time of every part, damaged ones too, as of the building of the index."""
        rows = self.rows("SELECT part, size, mtime_ns FROM idx.parts")
        return {row["part"]: PartStamp(size=row["size"], mtime_ns=row["mtime_ns"]) for row in rows}

    def damaged(self) -> tuple[DamagedPart, ...]:
        """Returns the parts that could not be read."""
        rows = self.rows("SELECT part, error FROM idx.parts WHERE error IS NOT NULL ORDER BY part")
        return tuple(DamagedPart(part=row["part"], reason=row["error"]) for row in rows)

    def close(self) -> None:
        """Closes the file."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reindex(path: str | os.PathLike[str], *, progress: Progress | None = None) -> IndexReport:
    """Builds the index of the store at `path` from its parts alone.

    Raises what read_manifest raises, and StoreError when the directory cannot be written.
    """
    root = Path(path).absolute()
    read_manifest(root)
    try:
        with FileLock(root / INDEX_LOCK):
            return _replace(root, old=None, progress=progress)
    except (OSError, duckdb.IOException) as error:
        raise StoreError(f"cannot write {root / INDEX}: {one_line(error)}") from error


def refresh_index(root: Path) -> None:
    """Brings the index up to the parts; a directory that cannot be written keeps the one it has."""
    open_index(root).close()


def open_index(root: Path) -> Index:
    """Returns an index of exactly the present parts, building it first where it is missing or stale."""
    index = _open_current(root)
    if index is not None:
        return index
    try:
        with FileLock(root / INDEX_LOCK):
            # The holder of the lock before may have built it.
            index = _open_current(root)
            if index is None:
                _replace(root, old=root / INDEX)
                index = _attach(root / INDEX)
    except (OSError, StoreError, duckdb.IOException):
        return _in_memory(root)
    return index or _in_memory(root)


def _open_current(root: Path) -> Index | None:
    index = _attach(root / INDEX)
    if index is None:
        return None
    with suppress(StoreDamagedError):
        if index.stamps() == list_parts(root):
            return index
    index.close()
    return None


def _attach(path: Path) -> Index | None:
    """Returns the index at `path`; None where this version of DuckDB and of ampo can read none."""
    if not path.exists():
        return None
    connection = _connect()
    try:
        # Attached, not connected to: `duckdb.connect` would hand out the file that an earlier connection
        # of this process still has open under the same name.
        connection.execute(f"ATTACH {quoted(path)} AS idx (READ_ONLY)")
        index = Index(connection, str(path))
        index.rows(f"SELECT {', '.join(ROW_COLUMNS)} FROM idx.rows LIMIT 0")
        index.rows("SELECT trace_id, is_usable FROM idx.traces LIMIT 0")
        index.rows("SELECT part, size, mtime_ns, rows, error FROM idx.parts LIMIT 0")
    except (duckdb.Error, StoreDamagedError):
        connection.close()
        return None
    return index


def _connect() -> duckdb.DuckDBPyConnection:
    # One thread: the look-ups are small, and the trainer needs the others.
    return duckdb.connect(config={"threads": 1})


def quoted(text: object) -> str:
    """Returns the text as a string literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def _replace(root: Path, *, old: Path | None, progress: Progress | None = None) -> IndexReport:
    for _ in range(REBUILDS):
        with suppress(FileNotFoundError):
            return _built(root, list_parts(root), old=old, progress=progress)
    raise StoreDamagedError(f"the parts of {root} change faster than they can be indexed; try again")


def _built(
    root: Path, parts: Mapping[str, PartStamp], *, old: Path | None, progress: Progress | None
) -> IndexReport:
    building = root / BUILDING
    for leftover in (building, building.with_name(BUILDING + ".wal")):
        leftover.unlink(missing_ok=True)
    with ExitStack() as stack:
        connection = _connect()
        stack.callback(connection.close)
        connection.execute(f"ATTACH {quoted(building)} AS idx (ROW_GROUP_SIZE {ROW_GROUP_ROWS})")
        report = _fill(connection, root, parts, old=old, progress=progress)
        connection.execute("DETACH idx")
    building.replace(root / INDEX)
    return report


def _in_memory(root: Path) -> Index:
    for _ in range(REBUILDS):
        connection = _connect()
        connection.execute("ATTACH ':memory:' AS idx")
        with suppress(FileNotFoundError):
            _fill(connection, root, list_parts(root), old=root / INDEX)
            return Index(connection, f"the index in memory of {root}")
        connection.close()
    raise StoreDamagedError(f"the parts of {root} change faster than they can be indexed; try again")


def _fill(
    connection: duckdb.DuckDBPyConnection,
    root: Path,
    parts: Mapping[str, PartStamp],
    *,
    old: Path | None,
    progress: Progress | None = None,
) -> IndexReport:
    """Fills the attached database `idx`. Raises FileNotFoundError when one of the parts is gone."""
    began = time.perf_counter()
    connection.execute(_TABLES)
    reused = _reuse(connection, parts, old) if old is not None else []
    damaged: list[DamagedPart] = []
    for done, (part, stamp) in enumerate(parts.items(), start=1):
        if part not in reused:
            count, error = _add_part(connection, root, part)
            damaged += [DamagedPart(part=part, reason=error)] if error else []
            values = [part, stamp.size, stamp.mtime_ns, count, error]
            connection.execute("INSERT INTO idx.parts VALUES (?, ?, ?, ?, ?)", values)
        if progress is not None:
            progress(done, len(parts))
    connection.execute(_SORT)
    (traces,) = connection.execute("SELECT count(*) FROM idx.rows").fetchone() or (0,)
    return IndexReport(
        parts=len(parts) - len(damaged),
        traces=traces,
        damaged=tuple(damaged),
        seconds=time.perf_counter() - began,
    )


def _reuse(connection: duckdb.DuckDBPyConnection, parts: Mapping[str, PartStamp], old: Path) -> list[str]:
    """Takes the rows of unaltered parts from the old index; returns those parts."""
    if not old.exists():
        return []
    try:
        connection.execute(f"ATTACH {quoted(old)} AS old (READ_ONLY)")
        connection.execute("BEGIN")
        candidates = connection.execute(_REUSABLE).fetchall()
        same = [row[0] for row in candidates if parts.get(row[0]) == PartStamp(size=row[1], mtime_ns=row[2])]
        connection.execute("INSERT INTO found FROM old.rows WHERE part IN (SELECT unnest(?))", [same])
        connection.execute("INSERT INTO idx.parts FROM old.parts WHERE part IN (SELECT unnest(?))", [same])
        connection.execute("COMMIT")
    except duckdb.Error:
        # An index that cannot be read is as good as none.
        with suppress(duckdb.Error):
            connection.execute("ROLLBACK")
        return []
    return same


def _add_part(connection: duckdb.DuckDBPyConnection, root: Path, part: str) -> tuple[int, str | None]:
    """Adds the rows of one part; returns their number, and the reason why it could not be read.

    Raises FileNotFoundError for a removed part: other parts have replaced it, and without them its traces
    would be missing.
    """
    try:
        check_digest(root / PARTS / part)
        table = part_rows(root / PARTS / part)
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        return 0, one_line(error)
    connection.register("part_rows", table)
    connection.execute(
        f"""INSERT INTO found SELECT ('0x' || problem_id)::UBIGINT, ('0x' || trace_id)::UBIGINT,
            epoch_us(created_at), {", ".join(PLAIN_COLUMNS)}, $part, row_group, row FROM part_rows""",
        {"part": part},
    )
    connection.unregister("part_rows")
    return table.num_rows, None
