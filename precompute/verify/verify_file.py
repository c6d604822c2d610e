"""Verdicts on anybody's (response, gold) pairs: a Parquet or JSON-lines file in, one verdict a row out.

Rows are read, verified and written as a stream, so that a file may be larger than memory.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Group
from rich.markup import escape

from precompute.problems.data_files import data_rows
from precompute.problems.data_rows import cell_of, find_column, gold_of, turns_of
from precompute.verify.verifier import Verifier
from store.errors import ProblemsError, UserError
from store.format.row_files import write_rows
from store.records import VERDICTS, AnswerForm
from store.terminal.tables import clipped, plain_table

RESPONSE_COLUMNS = ("response", "completion", "text", "output", "generation", "prediction", "solution")
GOLD_COLUMNS = ("gold", "answer", "ground_truth", "reward_model.ground_truth", "gold_answer")

RowVerdict = dict[str, Any]
"""The verdict on one row: the columns of SCHEMA."""

COUNT_BYTES = 1 << 20
SHOWN_CHARS = 80

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # from 1; of a JSON-lines file the line
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
class FileReport:
    """Verdicts over a whole file."""

    file: str
    response_column: str
    gold_column: str
    rows: int
    verdicts: Mapping[str, int]
    """Rows by verdict; every verdict is a key."""
    failed: Sequence[RowVerdict]
    """The first rows that do not match, up to the number that was requested."""


Progress = Callable[[int, int, str], None]
"""(rows verified, rows of the file, a note)."""


class PairFile:
    """A file of (response, gold) pairs. ProblemsError when it is not one.

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
        """Yields (row number from 1, response, gold)."""
        for number, row in data_rows(self.file, columns=[self.response, self.gold]):
            try:
                turns = turns_of(cell_of(row, self.response), self.response)
                gold = gold_of(cell_of(row, self.gold), self.gold)
            except ValueError as error:
                raise ProblemsError(f"{self.file}, row {number}: {error}") from None
            yield number, turns[-1].text if turns else "", gold

    def count(self) -> int:
        """Number of rows, without reading what is in them; blank lines are counted, too."""
        with self.file.open("rb") as handle:
            if self.file.suffix == ".parquet":
                return int(pq.ParquetFile(handle).metadata.num_rows)
            return sum(piece.count(b"\n") for piece in iter(lambda: handle.read(COUNT_BYTES), b"")) or 1


def verify_file(
    pairs: PairFile,
    verifier: Verifier,
    *,
    form: AnswerForm | None = None,
    failed: int,
    out: Path | None = None,
    progress: Progress,
) -> FileReport:
    """Verifies every row; keeps the first `failed` rows that do not match, and writes all of them to `out`.

    `out` appears whole, at the end, or not at all. Raises UserError for a wrong file or `out`.
    """
    counts, kept, total = Counter[str](), list[RowVerdict](), pairs.count()

    def counted() -> Iterator[RowVerdict]:
        for done, row in enumerate(row_verdicts(pairs, verifier, form), start=1):
            counts[row["verdict"]] += 1
            if row["verdict"] != "match" and len(kept) < failed:
                kept.append(row)
            progress(done, max(done, total), f"{counts['match'] / done:.1%} match")
            yield row

    if out is None:
        deque(counted(), maxlen=0)
    elif out.resolve() == pairs.file.resolve():
        raise UserError(f"--out {out}: that is the file to verify; give another name")
    else:
        write_rows(out, counted(), SCHEMA)
    return FileReport(
        file=str(pairs.file),
        response_column=pairs.response,
        gold_column=pairs.gold,
        rows=counts.total(),
        verdicts={verdict: counts[verdict] for verdict in VERDICTS},
        failed=kept,
    )


def row_verdicts(pairs: PairFile, verifier: Verifier, form: AnswerForm | None) -> Iterator[RowVerdict]:
    """Yields the verdicts in the order of the rows."""
    rows, again = tee(pairs.rows())
    verdicts = verifier.stream(((response, gold) for _, response, gold in rows), form)
    for verdict, (number, _, gold) in zip(verdicts, again, strict=False):
        yield {
            "row": number,
            "verdict": verdict.reason,
            "is_correct": verdict.is_correct,
            "gold": _storable(gold),
            "answer": None if verdict.answer is None else _storable(verdict.answer),
            "parsed_gold": verdict.parsed_gold,
            "parsed_answer": verdict.parsed_answer,
            "n_answers": verdict.n_answers,
            "detail": verdict.detail,
        }


def _storable(text: str) -> str:
    """Turns lone surrogates, which JSON may hold and UTF-8 may not, into question marks."""
    return text.encode("utf-8", "replace").decode()


def verify_tables(report: FileReport) -> Group:
    """Returns the counts by verdict, and gold and answer of the failed rows that were kept."""
    matches = report.verdicts["match"]
    counts = plain_table(
        f"{report.rows:,} rows of {report.file}: {report.response_column} / {report.gold_column}",
        text=["verdict"],
        numbers=["rows", "share"],
        rows=((verdict, n, f"{n / report.rows:.1%}") for verdict, n in report.verdicts.items() if n),
    )
    if not report.failed:
        return Group(counts)
    failed = plain_table(
        f"the first {len(report.failed):,} of {report.rows - matches:,} rows that do not match",
        text=["row", "verdict", "gold", "answer", "detail"],
        rows=(
            [str(row["row"]), row["verdict"]]
            + [escape(clipped(row[name] or "-", SHOWN_CHARS)) for name in ("gold", "answer", "detail")]
            for row in report.failed
        ),
    )
    return Group(counts, failed)
