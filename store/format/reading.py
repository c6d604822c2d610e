"""Reads a store: single traces out of parts, by the row groups that the index gives; problems; teachers."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import StoreDamagedError, StoreError
from store.format.columns import BIG_COLUMNS, TOKEN_COLUMNS
from store.format.index import PLAIN_COLUMNS
from store.format.manifest import PARTS, PROBLEMS, TEACHERS
from store.format.parts import damage_named, one_line, open_part
from store.format.schema import TRACE_SCHEMA
from store.records import Problem, TeacherRecord, Trace

OPEN_PARTS = 256
"""Files kept open for reading, each with its footer in memory."""

MAKE_AGAIN = "remove it and run `ampo precompute teachers` (or `ampo store import`) again"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class PartReader:
    """Reads the row groups of parts; keeps the last OPEN_PARTS of them open."""

    def __init__(self, root: Path) -> None:
        self._parts = root / PARTS
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    def traces(self, rows: Sequence[Mapping[str, Any]], *, tokens: bool) -> list[Trace]:
        """Returns the traces of index rows, in any order.

        Raises StoreDamagedError, naming the part, and FileNotFoundError for a removed part.
        """
        rows = sorted(rows, key=_place)
        table = self.table(rows, BIG_COLUMNS if tokens else ("text",))
        token_ids, logprobs = (
            map(tuple, table[name].to_pylist()) if tokens else [()] * len(rows) for name in TOKEN_COLUMNS
        )
        columns = zip(rows, table["text"].to_pylist(), token_ids, logprobs, strict=True)
        return [_trace(row, text, ids, values) for row, text, ids, values in columns]

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pa.Table:
        """Returns columns of index rows, in order of part, row group and row; reads no row group twice."""
        names = list(columns)
        schema = pa.schema([TRACE_SCHEMA.field(name) for name in names])
        pieces = [schema.empty_table()]
        for (part, group), members in groupby(sorted(rows, key=_place), key=lambda row: _place(row)[:2]):
            with damage_named(self._parts / part):
                piece = self._file(part).read_row_group(group, columns=names, use_threads=False).select(names)
                if piece.schema != schema:
                    raise ValueError("its columns are not those of a trace")
                pieces.append(piece.take([row["row"] for row in members]))
        return pa.concat_tables(pieces)

    def _file(self, part: str) -> pq.ParquetFile:
        if part not in self._open:
            self._open[part] = open_part(self._parts / part)
            if len(self._open) > OPEN_PARTS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(part)
        return self._open[part]

    def close(self) -> None:
        """Closes every open part."""
        while self._open:
            self._open.popitem()[1].close()


def _place(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["part"], row["row_group"], row["row"]


def _trace(
    row: Mapping[str, Any], text: str, token_ids: tuple[int, ...], logprobs: tuple[float, ...]
) -> Trace:
    return Trace.stored(
        **{name: row[name] for name in PLAIN_COLUMNS},
        problem_id=f"{row['problem']:016x}",
        trace_id=f"{row['trace']:016x}",
        created_at=_EPOCH + timedelta(microseconds=row["created_us"]),
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
    )


def read_problems(root: Path) -> list[Problem]:
    """Returns every problem, in order of arrival. Raises StoreDamagedError."""
    path = root / PROBLEMS
    if not path.exists():
        return []
    with damage_named(path, MAKE_AGAIN), open_part(path) as file:
        rows = file.read(use_threads=False).to_pylist()
        ids = [row.pop("problem_id") for row in rows]
        problems = [_problem(row) for row in rows]
        if ids != [problem.problem_id for problem in problems]:
            raise ValueError("the problem_id of a row does not fit its content")
    return problems


def _problem(row: dict[str, Any]) -> Problem:
    metadata, turns = (json.loads(row.pop(name)) for name in ("metadata", "turns"))
    return Problem(**row, metadata=metadata, turns=tuple(map(tuple, turns)))


def read_teachers(root: Path) -> dict[str, TeacherRecord]:
    """Returns every registered teacher, in order of the name. Raises StoreDamagedError."""
    records = {}
    for path in sorted((root / TEACHERS).glob("[!.]*.json")):
        try:
            content = json.loads(path.read_bytes())
            content.pop("generation_fingerprint", None)
            record = TeacherRecord(**content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise StoreDamagedError(f"{path} cannot be read: {one_line(error)}; {MAKE_AGAIN}") from error
        records[record.name] = record
    return records


def chosen_teachers(root: Path, names: Sequence[str] | None) -> dict[str, TeacherRecord]:
    """Returns the named teachers (None or empty: all). Raises StoreError for an unknown one."""
    records = read_teachers(root)
    for name in names or ():
        if name not in records:
            raise StoreError(f"no teacher {name!r} in {root}; its teachers: {', '.join(records) or 'none'}")
    return {name: record for name, record in records.items() if not names or name in names}
