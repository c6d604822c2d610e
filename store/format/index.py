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
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import duckdb

from store.errors import StoreDamagedError, StoreError
from store.format.columns import BIG_COLUMNS, TRACE_COLUMNS
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
"""Called with (done, total) while a store is read or written."""

BUILDING = ".building-index.duckdb"
"""Its name while it is built; the index lock is held, so one is enough."""

REBUILDS = 5
"""Attempts at indexing parts that are being replaced."""

INTERRUPTED = "Query interrupted"
"""Text of the RuntimeError that DuckDB makes of a Ctrl-C during a query."""
WAY_OUT = "make it again with `ampo store reindex`"

ROW_GROUP_ROWS = 2048
"""DuckDB's smallest: a look-up scans one row group of the index for each problem."""

_NUMBERS = ("trace_id", "problem_id", "created_at")
"""Columns that are numbers in the index: `trace`, `problem`, `created_us`."""

PLAIN_COLUMNS = [name for name in TRACE_COLUMNS if name not in (*_NUMBERS, *BIG_COLUMNS)]
"""Columns that the index holds as they are in a part."""

ROW_COLUMNS = ["problem", "trace", "created_us", *PLAIN_COLUMNS, "part", "row_group", "row"]
"""Columns of `idx.rows`: all that store.format.reading needs of a trace."""

_TABLES = f"""
    CREATE TABLE idx.parts (part VARCHAR, size BIGINT, mtime_ns BIGINT, rows BIGINT, error VARCHAR);
    CREATE TABLE idx.rows (problem UBIGINT, trace UBIGINT, created_us BIGINT,
        {", ".join(f"{name} {TRACE_COLUMNS[name]}" for name in PLAIN_COLUMNS)},
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
    SELECT part, size, mtime_ns, rows FROM old.parts AS p
    WHERE error IS NULL AND rows = (SELECT count(*) FROM old.rows AS t WHERE t.part = p.part)
"""


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
        except RuntimeError as error:
            if str(error) == INTERRUPTED:
                raise KeyboardInterrupt from error
            raise

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


def reindex(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Index:
    """Builds the index of the store at `path` from its parts alone, and opens it.

    Raises what read_manifest raises, and StoreError when the directory cannot be written.
    """
    root = Path(path).absolute()
    read_manifest(root)
    try:
        with FileLock(root / INDEX_LOCK):
            return _replaced(root, reuse=False, progress=progress)
    except (OSError, duckdb.IOException) as error:
        raise StoreError(f"cannot write {root / INDEX}: {one_line(error)}") from error


def refresh_index(root: Path) -> None:
    """Brings the index up to the parts; a directory that cannot be written keeps the one it has."""
    open_index(root).close()


def open_index(root: Path) -> Index:
    """Returns an index of exactly the present parts, building it first where it is missing or stale."""
    if index := _current(root):
        return index
    with suppress(OSError, StoreError, duckdb.IOException), FileLock(root / INDEX_LOCK):
        # The holder of the lock before may have built it.
        return _current(root) or _replaced(root, reuse=True)
    return _built(root, ":memory:", reuse=True)


def _current(root: Path) -> Index | None:
    """Returns the index on disk; None where it is missing, broken, or not of exactly the present parts."""
    with suppress(duckdb.Error, StoreDamagedError), ExitStack() as stack:
        index = stack.enter_context(_attached(root / INDEX))
        index.rows(f"SELECT {', '.join(ROW_COLUMNS)} FROM idx.rows LIMIT 0")
        rows = index.rows("SELECT part, size, mtime_ns FROM idx.parts")
        if {row["part"]: (row["size"], row["mtime_ns"]) for row in rows} == list_parts(root):
            stack.pop_all()
            return index
    return None


def _attached(path: Path) -> Index:
    """Opens an index file. Raises duckdb.Error."""
    # Attached, not connected to: `duckdb.connect` would hand out the file that an earlier connection
    # of this process still has open under the same name.
    connection = _connect()
    connection.execute(f"ATTACH {quoted(path)} AS idx (READ_ONLY)")
    return Index(connection, str(path))


def _connect() -> duckdb.DuckDBPyConnection:
    # One thread: the look-ups are small, and the trainer needs the others.
    return duckdb.connect(config={"threads": 1})


def quoted(text: object) -> str:
    """Returns the text as a string literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def _replaced(root: Path, *, reuse: bool, progress: Progress | None = None) -> Index:
    """Builds the index aside, renames and opens it; requires the index lock."""
    building = root / BUILDING
    _built(root, building, reuse=reuse, progress=progress).close()
    building.replace(root / INDEX)
    return _attached(root / INDEX)


def _built(root: Path, target: Path | str, *, reuse: bool, progress: Progress | None = None) -> Index:
    """Builds an index of the present parts in a new file, or in memory; `reuse`: with rows of the old one."""
    for _ in range(REBUILDS):
        for leftover in (root / BUILDING, root / f"{BUILDING}.wal"):
            if target == root / BUILDING:
                leftover.unlink(missing_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:
            connection = stack.enter_context(_connect())
            connection.execute(f"ATTACH {quoted(target)} AS idx (ROW_GROUP_SIZE {ROW_GROUP_ROWS})")
            _fill(connection, root, old=root / INDEX if reuse else None, progress=progress)
            stack.pop_all()
            return Index(connection, f"the index of {root}")
    raise StoreDamagedError(f"the parts of {root} change faster than they can be indexed; try again")


def _fill(
    connection: duckdb.DuckDBPyConnection, root: Path, *, old: Path | None, progress: Progress | None
) -> None:
    """Fills the attached database `idx`. Raises FileNotFoundError when a part is removed meanwhile."""
    connection.execute(_TABLES)
    parts = list_parts(root)
    reused = _reuse(connection, parts, old) if old is not None else {}
    for done, (part, stamp) in enumerate(parts.items(), start=1):
        count, error = (reused[part], None) if part in reused else _add_part(connection, root, part)
        connection.execute("INSERT INTO idx.parts VALUES (?, ?, ?, ?, ?)", [part, *stamp, count, error])
        if progress is not None:
            progress(done, len(parts))
    connection.execute(_SORT)


def _reuse(
    connection: duckdb.DuckDBPyConnection, parts: Mapping[str, PartStamp], old: Path
) -> dict[str, int]:
    """Copies the rows of unaltered parts from the old index; returns those parts, each with its rows."""
    try:
        connection.execute(f"ATTACH {quoted(old)} AS old (READ_ONLY)")
        rows = connection.execute(_REUSABLE).fetchall()
        same = {part: count for part, size, time, count in rows if parts.get(part) == (size, time)}
        connection.execute("INSERT INTO found FROM old.rows WHERE part IN (SELECT unnest(?))", [list(same)])
    except duckdb.Error:
        # An index that cannot be read is as good as none.
        return {}
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
