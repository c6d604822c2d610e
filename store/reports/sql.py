"""SQL over a store, for `ampo inspect store sql`.

The views of store.format.columns.VIEWS are defined on the connection of the index, which is then closed to
every file outside the store. Only SELECT statements run, so no query can write or disturb a writer. Damaged
parts are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import duckdb
import pyarrow as pa

from store.errors import StoreError, UserError
from store.format.columns import TEACHER_COLUMNS
from store.format.index import open_index, quoted
from store.format.manifest import PARTS
from store.format.parts import one_line
from store.format.schema import PROBLEM_SCHEMA, TRACE_SCHEMA, table_of, teacher_json
from store.reader import TraceStore
from store.records import TeacherRecord

# A timestamp with a time zone reaches Python only through a package that DuckDB does not bring along. While
# compacted parts replace old ones a trace is in two parts; the index knows which row counts.
_TRACES = """
    CREATE TEMP VIEW traces AS
    SELECT * EXCLUDE (filename) REPLACE (make_timestamp(epoch_us(created_at)) AS created_at),
           is_correct AND filtered IS NULL AS is_usable
    FROM {rows} AS stored
    SEMI JOIN idx.traces AS counted ON stored.trace_id = counted.trace_id AND filename = {parts} || part
"""

_EXCERPT = "\n\nLINE "
"""Begins the part of a query in DuckDB's messages, which is left out."""

_SETTINGS = (
    "threads = {threads}",
    "temp_directory = ''",
    "allowed_directories = [{parts}]",
    "enable_external_access = false",
    "python_enable_replacements = false",
    "lock_configuration = true",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlResult:
    """Result of a query."""

    columns: tuple[str, ...]
    """Distinct names: repeated ones get their position as a suffix."""
    rows: list[tuple[Any, ...]]
    more: bool
    """Rows were left out by the limit."""

    def dicts(self) -> list[dict[str, Any]]:
        """Returns each row as column -> value."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class StoreSql:
    """The views of an open store. A context manager."""

    def __init__(self, store: TraceStore) -> None:
        self._index = open_index(store.path)
        connection = self._index.connection
        parts = self._index.rows("SELECT part FROM idx.parts WHERE error IS NULL ORDER BY part")
        parts_root = f"{store.path / PARTS}/"
        files = ", ".join(quoted(parts_root + row["part"]) for row in parts)
        nothing = TRACE_SCHEMA.append(pa.field("filename", pa.string())).empty_table()
        connection.register("no_traces", nothing)
        connection.register("problems", table_of(store.problems(), PROBLEM_SCHEMA))
        connection.register("teachers", _teachers_table(list(store.teachers().values())))
        rows = f"read_parquet([{files}], filename = true)" if files else "no_traces"
        connection.execute(_TRACES.format(rows=rows, parts=quoted(parts_root)))
        connection.execute("CREATE TEMP VIEW parts AS FROM idx.parts")
        for setting in _SETTINGS:
            connection.execute("SET " + setting.format(parts=quoted(parts_root), threads=os.cpu_count() or 1))

    def query(self, sql: str, *, limit: int | None = None) -> SqlResult:
        """Returns the rows of one SELECT, or the first `limit` of them.

        Raises UserError, in one line, for a statement that is no SELECT and for errors of DuckDB.
        """
        # In a thread of its own: DuckDB ignores Ctrl-C while it computes, but it can be interrupted.
        with ThreadPoolExecutor(max_workers=1) as thread:
            result = thread.submit(self._query, sql, limit)
            try:
                return result.result()
            except KeyboardInterrupt:
                self._index.connection.interrupt()
                raise

    def _query(self, sql: str, limit: int | None) -> SqlResult:
        try:
            statements = duckdb.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise UserError("SQL: give one SELECT; the store is read-only here")
            cursor = self._index.connection.execute(statements[0])
            names = [column[0] for column in cursor.description or ()]
            rows = cursor.fetchall() if limit is None else cursor.fetchmany(limit + 1)
        except duckdb.IOException as error:
            raise StoreError(f"a part was removed meanwhile ({one_line(error)}); try again") from error
        except duckdb.Error as error:
            raise UserError(f"SQL: {' '.join(str(error).split(_EXCERPT)[0].split())}") from error
        columns = (
            name if name not in names[:number] else f"{name}_{number + 1}"
            for number, name in enumerate(names)
        )
        return SqlResult(
            columns=tuple(columns), rows=rows[:limit], more=limit is not None and len(rows) > limit
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._index.close()


def _teachers_table(records: Sequence[TeacherRecord]) -> pa.Table:
    rows = [
        {
            name: value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)
            for name, value in teacher_json(record).items()
        }
        for record in records
    ]
    return pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in TEACHER_COLUMNS]))
