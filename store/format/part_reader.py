"""Reads single traces out of parts, by the byte ranges that the index gives."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from store.format.manifest import PARTS
from store.format.pages import lists_of_page, texts_of_page
from store.format.parts import damage_named
from store.format.schema import PLAIN_COLUMNS, TOKEN_COLUMNS
from store.records import Trace

OPEN_PARTS = 256
"""Files kept open for reading."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class PartReader:
    """Reads single traces out of parts, by the places that the index gives."""

    def __init__(self, root: Path) -> None:
        self._parts = root / PARTS
        self._open: OrderedDict[str, int] = OrderedDict()

    def traces(self, rows: Sequence[Mapping[str, Any]], *, tokens: bool) -> list[Trace]:
        """The traces of index rows (store.format.index.ROW_COLUMNS), in their order.

        Raises StoreDamagedError, naming the part, and FileNotFoundError for a part that is gone.
        """
        token_ids, logprobs = (
            [tuple(values.tolist()) for values in self.lists(rows, column)] if tokens else [()] * len(rows)
            for column in TOKEN_COLUMNS
        )
        columns = zip(rows, self.texts(rows), token_ids, logprobs, strict=True)
        return [_trace(row, text, ids, probs) for row, text, ids, probs in columns]

    def texts(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The texts of index rows."""
        return self._values(rows, "text", lambda page: [text.decode() for text in texts_of_page(page)])

    def lists(self, rows: Sequence[Mapping[str, Any]], column: str) -> list[np.ndarray[Any, Any]]:
        """The `token_ids` or `logprobs` of index rows."""
        dtype = "<f4" if column == "logprobs" else "<i4"
        return self._values(rows, column, lambda page: lists_of_page(page, dtype))

    def _values(
        self, rows: Sequence[Mapping[str, Any]], column: str, decode: Callable[[bytes], Sequence[Any]]
    ) -> list[Any]:
        """Every page is read once, in the order in which pages lie."""
        page, size, inside = (f"{column}_{name}" for name in ("page", "size", "row"))
        order = sorted(range(len(rows)), key=lambda number: (rows[number]["part"], rows[number][page]))
        found: list[Any] = [None] * len(rows)
        at: tuple[str, int] | None = None
        decoded: Sequence[Any] = ()
        for number in order:
            row = rows[number]
            if at != (row["part"], row[page]):
                at = row["part"], row[page]
                with damage_named(self._parts / row["part"]):
                    decoded = decode(self._page(row["part"], row[page], row[size]))
            found[number] = decoded[row[inside]]
        return found

    def _page(self, part: str, offset: int, size: int) -> bytes:
        if part in self._open:
            self._open.move_to_end(part)
        else:
            self._open[part] = os.open(self._parts / part, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > OPEN_PARTS:
                os.close(self._open.popitem(last=False)[1])
        return os.pread(self._open[part], size, offset)

    def close(self) -> None:
        """Closes every open part."""
        while self._open:
            os.close(self._open.popitem()[1])


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
