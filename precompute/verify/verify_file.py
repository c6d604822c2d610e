"""Verdicts on anybody's (response, gold) pairs: a Parquet or JSON-lines file in, one verdict a row out.

Rows are read, judged and written as a stream, so that a file may be larger than memory.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from precompute.config import AnswerForm
from precompute.problems.data_rows import cell_of, data_rows, find_column, short
from precompute.verify.verifier import Verdict, Verifier
from store.errors import ProblemsError, UserError
from store.format.files import whole_file
from store.records import VERDICTS

RESPONSE_COLUMNS = ("response", "completion", "text", "output", "generation", "prediction", "solution")
GOLD_COLUMNS = ("gold", "answer", "ground_truth", "reward_model.ground_truth", "gold_answer")

OUT_SUFFIXES = (".parquet", ".jsonl")
BATCH_ROWS = 1_024
"""Verdicts that become one batch of a Parquet file."""
COUNT_BYTES = 1 << 20

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("verdict", pa.string()),
        ("is_correct", pa.bool_()),
        ("gold", pa.string()),
        ("answer", pa.string()),
        ("parsed_gold", pa.string()),
        ("parsed_answer", pa.string()),
        ("n_answers", pa.int64()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowVerdict:
    """The verdict on one row; the fields of SCHEMA."""

    row: int
    """From 1; of a JSON-lines file the line."""
    verdict: str
    """One of store.records.VERDICTS."""
    is_correct: bool
    gold: str
    answer: str | None
    parsed_gold: str | None
    parsed_answer: str | None
    n_answers: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """What came out over a whole file."""

    file: str
    response_column: str
    gold_column: str
    rows: int
    verdicts: Mapping[str, int]
    """Rows by verdict; every verdict is a key."""
    failed: Sequence[RowVerdict]
    """The first rows that are no match, as many as were asked for."""

    @property
    def matches(self) -> int:
        """Rows whose answer is the gold answer."""
        return self.verdicts["match"]


Progress = Callable[[int, int, str], None]
"""(rows judged, rows of the file, a note)."""
Sink = Callable[[RowVerdict], None]


class PairFile:
    """A file of (response, gold) pairs. ProblemsError when it is none.

    A column given by name may be nested, e.g. `reward_model.ground_truth`; None takes the first of
    RESPONSE_COLUMNS or GOLD_COLUMNS that the first row has. A response is text or a chat, whose last turn is
    the response.
    """

    def __init__(self, file: Path, response_column: str | None, gold_column: str | None) -> None:
        first = next(data_rows(file), None)
        if first is None:
            raise ProblemsError(f"{file} has no row")
        self.file = file
        self.response = find_column(file, first[1], response_column, RESPONSE_COLUMNS, "--response-column")
        golds = tuple(name for name in GOLD_COLUMNS if name != self.response)
        self.gold = find_column(file, first[1], gold_column, golds, "--gold-column")

    def rows(self) -> Iterator[tuple[int, str, str]]:
        """(row number from 1, response, gold)."""
        wanted = (f"{self.response}.", f"{self.gold}.")
        for number, row in data_rows(
            self.file, skip=lambda leaf: not f"{'.'.join(leaf)}.".startswith(wanted)
        ):
            try:
                yield number, response_text(cell_of(row, self.response)), gold_text(cell_of(row, self.gold))
            except ValueError as error:
                raise ProblemsError(f"{self.file}, row {number}: {error}") from None

    def count(self) -> int:
        """Rows, without reading what is in them; blank lines are counted, too."""
        with self.file.open("rb") as handle:
            if self.file.suffix == ".parquet":
                return int(pq.ParquetFile(handle).metadata.num_rows)
            return sum(piece.count(b"\n") for piece in iter(lambda: handle.read(COUNT_BYTES), b"")) or 1


def response_text(cell: Any) -> str:
    """The response in a cell; nothing at all is an empty one. ValueError when it is no text and no chat."""
    if isinstance(cell, list) and cell and isinstance(cell[-1], Mapping):
        cell = cell[-1].get("content")
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise ValueError(f"a response is text or a list of chat turns, not {short(cell)}")
    return cell


def gold_text(cell: Any) -> str:
    """The gold answer in a cell, a number as it is written. ValueError when it is neither."""
    if cell is None:
        return ""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise ValueError(f"a gold answer is text or a number, not {short(cell)}")
    return str(cell)


def verify_file(
    pairs: PairFile,
    verifier: Verifier,
    *,
    form: AnswerForm | None = None,
    failed: int,
    out: Path | None = None,
    progress: Progress,
) -> FileReport:
    """Judges every row; keeps the first `failed` rows that are no match, and writes all of them to `out`.

    `out` appears whole, at the end, or not at all. Raises UserError for a wrong file or `out`.
    """
    counts, kept, total = Counter[str](), list[RowVerdict](), pairs.count()
    with _sink(pairs.file, out) as write:
        for done, row in enumerate(row_verdicts(pairs, verifier, form), start=1):
            counts[row.verdict] += 1
            if row.verdict != "match" and len(kept) < failed:
                kept.append(row)
            write(row)
            progress(done, max(done, total), f"{counts['match'] / done:.1%} match")
    return FileReport(
        file=str(pairs.file),
        response_column=pairs.response,
        gold_column=pairs.gold,
        rows=counts.total(),
        verdicts={verdict: counts[verdict] for verdict in VERDICTS},
        failed=kept,
    )


def row_verdicts(pairs: PairFile, verifier: Verifier, form: AnswerForm | None) -> Iterator[RowVerdict]:
    """The verdicts in the order of the rows."""
    asked: deque[tuple[int, str]] = deque()

    def ask() -> Iterator[tuple[str, str]]:
        for number, response, gold in pairs.rows():
            asked.append((number, gold))
            yield response, gold

    for verdict in verifier.stream(ask(), form):
        yield _row_verdict(*asked.popleft(), verdict)


def _row_verdict(row: int, gold: str, verdict: Verdict) -> RowVerdict:
    return RowVerdict(
        row=row,
        verdict=verdict.reason,
        is_correct=verdict.is_correct,
        gold=_storable(gold),
        answer=None if verdict.answer is None else _storable(verdict.answer),
        parsed_gold=verdict.parsed_gold,
        parsed_answer=verdict.parsed_answer,
        n_answers=verdict.n_answers,
        detail=verdict.detail,
    )


def _storable(text: str) -> str:
    """Lone surrogates, which JSON may hold and UTF-8 may not, become question marks."""
    return text.encode("utf-8", "replace").decode()


def _sink(file: Path, out: Path | None) -> AbstractContextManager[Sink]:
    if out is None:
        return _nowhere()
    if out.suffix not in OUT_SUFFIXES:
        raise UserError(f"--out {out}: a file of verdicts ends in {' or '.join(OUT_SUFFIXES)}")
    if out.resolve() == file.resolve():
        raise UserError(f"--out {out}: that is the file to verify; give another name")
    return _parquet(out) if out.suffix == ".parquet" else _json_lines(out)


@contextmanager
def _nowhere() -> Iterator[Sink]:
    yield lambda row: None


@contextmanager
def _json_lines(out: Path) -> Iterator[Sink]:
    with whole_file(out) as file:
        yield lambda row: (file.write(json.dumps(asdict(row)).encode() + b"\n"), None)[1]


@contextmanager
def _parquet(out: Path) -> Iterator[Sink]:
    waiting: list[dict[str, Any]] = []
    with whole_file(out) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:

        def write(row: RowVerdict) -> None:
            waiting.append(asdict(row))
            if len(waiting) == BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
                waiting.clear()

        yield write
        writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
