"""The store as SQL tables, read-only: what `ampo inspect store sql` asks.

    traces      every column of every trace, straight from the parts, and is_usable
    problems    problem_id, question, answer, source, system_prompt
    teachers    each teacher's recipe and engine; chat_template_kwargs and sampling as JSON
    parts       part, size, mtime_ns, rows, error of each file of traces

They are views in a DuckDB of their own in memory, closed to everything but the files behind them, so no query
can write, read another file, or get in the way of a writer. Damaged parts are left out.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from store.errors import StoreError, UserError
from store.format.index import quoted
from store.format.manifest import PARTS, PROBLEMS
from store.format.parts import one_line
from store.format.schema import PROBLEM_SCHEMA, TRACE_SCHEMA, teacher_json
from store.reader import TraceStore

FETCH_ROWS = 1024

# A timestamp with a time zone reaches Python only through a package that DuckDB does not bring along.
_TRACES = """
    CREATE VIEW traces AS SELECT
        * EXCLUDE (filename) REPLACE (make_timestamp(epoch_us(created_at)) AS created_at),
        is_correct AND filtered IS NULL AS is_usable
    FROM read_parquet({files}, filename = true) {where}
"""

# While old parts make way for compacted ones a trace stands in both; the index knows which counts.
_ONLY_LIVE = "WHERE (trace_id, filename) IN (SELECT (trace_id, filename) FROM live_traces)"

_LIVE = "SELECT trace_id, part FROM idx.traces"

_DOUBLED = """
    SELECT coalesce(sum(rows), 0) > (SELECT count(*) FROM idx.traces) AS doubled
    FROM idx.parts WHERE error IS NULL
"""

_CLOSED = (
    "SET enable_external_access = false",
    "SET autoload_known_extensions = false",
    "SET python_enable_replacements = false",
    "SET lock_configuration = true",
)

TEACHER_COLUMNS = [
    "name", "model", "revision", "engine", "engine_version", "chat_template", "system_prompt",
    "chat_template_kwargs", "sampling", "tokenizer_fingerprint", "generation_fingerprint",
]  # fmt: skip

VIEWS: Mapping[str, Sequence[str]] = {
    "traces": [*TRACE_SCHEMA.names, "is_usable"],
    "problems": PROBLEM_SCHEMA.names,
    "teachers": TEACHER_COLUMNS,
    "parts": ["part", "size", "mtime_ns", "rows", "error"],
}
"""Name -> columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The result of a query."""

    columns: tuple[str, ...]
    """Different names; of equal ones the later get a number."""
    rows: list[tuple[Any, ...]]
    more: bool
    """Whether rows were left out by the limit."""

    def dicts(self) -> list[dict[str, Any]]:
        """Each row as column -> value."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Views:
    """The views of a store that is open for reading. A context manager."""

    def __init__(self, store: TraceStore) -> None:
        self._spill = tempfile.TemporaryDirectory(prefix="ampo-sql-")
        self._connection = duckdb.connect(config={"temp_directory": self._spill.name})
        files = [str(store.path / PARTS / row["part"]) for row in store.index.rows(_WHOLE)]
        self._define_traces(store, files)
        self._define_problems(store)
        self._define("parts", _table(store.index.rows("SELECT * FROM idx.parts"), VIEWS["parts"]))
        teachers = [_teacher_row(teacher_json(record)) for record in store.teachers().values()]
        self._define("teachers", _table(teachers, TEACHER_COLUMNS))
        read = [*files, str(store.path / PROBLEMS)]
        self._connection.execute(f"SET allowed_paths = {_list([*read, *map(_literal, read)])}")
        for setting in _CLOSED:
            self._connection.execute(setting)

    def query(
        self, sql: str, parameters: Mapping[str, object] | None = None, *, limit: int | None = None
    ) -> Answer:
        """The rows of one SELECT, or the first `limit` of them.

        Raises UserError, in one line, for what DuckDB cannot do or what is no SELECT.
        """
        # In a thread of its own: DuckDB does not see Ctrl-C while it computes, but can be told of it.
        with ThreadPoolExecutor(max_workers=1) as thread:
            answer = thread.submit(self._answer, sql, parameters, limit)
            try:
                return answer.result()
            except KeyboardInterrupt:
                self._connection.interrupt()
                raise

    def _answer(self, sql: str, parameters: Mapping[str, object] | None, limit: int | None) -> Answer:
        try:
            statements = duckdb.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise UserError("SQL: one SELECT is wanted; nothing can be written")
            cursor = self._connection.execute(statements[0], parameters)
            columns = _different([column[0] for column in cursor.description or ()])
            rows = list(_fetched(cursor, None if limit is None else limit + 1))
        except duckdb.IOException as error:
            raise StoreError(f"a part went away while it was read ({one_line(error)}); ask again") from error
        except duckdb.Error as error:
            raise UserError(f"SQL: {_in_one_line(error)}") from error
        return Answer(columns=columns, rows=rows[:limit], more=limit is not None and len(rows) > limit)

    def close(self) -> None:
        """Lets go of every file."""
        self._connection.close()
        self._spill.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _define_traces(self, store: TraceStore, files: Sequence[str]) -> None:
        if not files:
            self._define("traces", TRACE_SCHEMA.append(pa.field("is_usable", pa.bool_())).empty_table())
            return
        where = ""
        if store.index.rows(_DOUBLED)[0]["doubled"]:
            live = store.index.rows(_LIVE)
            paths = [str(store.path / PARTS / row["part"]) for row in live]
            ids = [row["trace_id"] for row in live]
            self._define("live_traces", pa.table({"trace_id": ids, "filename": paths}))
            where = _ONLY_LIVE
        self._connection.execute(_TRACES.format(files=_list(map(_literal, files)), where=where))

    def _define_problems(self, store: TraceStore) -> None:
        path = store.path / PROBLEMS
        if path.exists():
            self._connection.execute(
                f"CREATE VIEW problems AS FROM read_parquet({_list([_literal(str(path))])})"
            )
        else:
            self._define("problems", PROBLEM_SCHEMA.empty_table())

    def _define(self, name: str, table: pa.Table) -> None:
        self._connection.register("arriving", table)
        self._connection.execute(f"CREATE TABLE {name} AS FROM arriving")
        self._connection.unregister("arriving")


_WHOLE = "SELECT part FROM idx.parts WHERE error IS NULL ORDER BY part"


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pa.Table:
    kinds = {"size": pa.int64(), "mtime_ns": pa.int64(), "rows": pa.int64()}
    return pa.table(
        {name: pa.array([row[name] for row in rows], kinds.get(name, pa.string())) for name in columns}
    )


def _teacher_row(content: Mapping[str, Any]) -> dict[str, str | None]:
    return {
        name: value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)
        for name, value in content.items()
    }


def _fetched(cursor: duckdb.DuckDBPyConnection, most: int | None) -> Iterator[tuple[Any, ...]]:
    left = most
    while left is None or left > 0:
        part = cursor.fetchmany(FETCH_ROWS if left is None else min(FETCH_ROWS, left))
        if not part:
            return
        yield from part
        left = None if left is None else left - len(part)


def _different(names: Sequence[str]) -> tuple[str, ...]:
    """`x, x` becomes `x, x_2`: each row is to be a mapping."""
    taken: dict[str, None] = {}
    for name in names:
        number, own = 1, name
        while own in taken:
            number += 1
            own = f"{name}_{number}"
        taken[own] = None
    return tuple(taken)


def _literal(path: str) -> str:
    """For DuckDB, which takes every path for a pattern: one that fits this path alone."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def _list(paths: Iterable[str]) -> str:
    return "[" + ", ".join(map(quoted, paths)) + "]"


def _in_one_line(error: duckdb.Error) -> str:
    """What DuckDB says, without the picture of the place."""
    if "'pytz'" in str(error):
        return "a timestamp with a time zone cannot be shown; cast it, e.g. now()::TIMESTAMP"
    return " ".join(str(error).split("\n\nLINE ")[0].split())
