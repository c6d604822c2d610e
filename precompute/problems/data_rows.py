"""Cells of anybody's rows: which column, and what its cells hold.

One rule for text, chat and gold cells serves problem files, imported traces and `ampo verify`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from precompute.config_file import short
from precompute.problems.data_files import Row
from store.errors import ProblemsError

REASONING_KEYS = ("reasoning_content", "reasoning")
ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of sharegpt's turns -> those of a chat."""


class Turn(NamedTuple):
    """A text in a cell, with the other facts of its entry."""

    text: str
    """Empty where there is none."""
    role: str | None = None
    source: str | None = None
    reasoning: str = ""
    """Thought that precedes the text, where it stands apart."""


def find_column(file: Path | str, row: Row, wanted: str | None, known: tuple[str, ...], option: str) -> str:
    """Returns the column `wanted`, or for None the first of `known` that the row has.

    Raises ProblemsError that names the row's columns, and the `option` that chooses.
    """
    names = (wanted,) if wanted else known
    for name in names:
        if has_cell(row, name):
            return name
    others = " or the like" if len(names) > 6 else ""
    raise ProblemsError(
        f"{file} has no column {' or '.join(map(repr, names[:6]))}{others} ({option}); its columns: "
        f"{', '.join(column_names(row)) or 'none'}"
    )


def column_names(row: Row, above: str = "") -> Iterator[str]:
    """Yields every column by its dotted name."""
    for name, cell in row.items():
        if isinstance(cell, Mapping):
            yield from column_names(cell, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def has_cell(row: Row, name: str) -> bool:
    """Returns whether the row has the column, which may be empty."""
    return name in row or name in column_names(row)


def cell_of(row: Row, name: str) -> Any:
    """Returns the content of a column, e.g. of `reward_model.ground_truth`. ValueError without it."""
    if name in row:
        return row[name]
    cell: Any = row
    for part in name.split("."):
        if not isinstance(cell, Mapping) or part not in cell:
            raise ValueError(f"the column {name!r} is missing")
        cell = cell[part]
    return cell


def turns_of(cell: Any, column: str) -> list[Turn]:
    """Returns the texts of a cell: a text, a list of texts, or a list of {content, role, source} or, as
    sharegpt has it, {value, from}; such a list may be JSON text.

    ValueError when it holds something else.
    """
    if cell is None:
        return []
    if isinstance(cell, str):
        listed = listed_turns(cell)
        if listed is None:
            return [Turn(cell)]
        cell = listed
    if not isinstance(cell, list):
        raise ValueError(f"{column} is neither a text nor a list of messages: {short(cell)}")
    turns = []
    for entry in cell:
        turn = entry if isinstance(entry, Mapping) else {"content": entry}
        text = turn.get("content", turn.get("value"))
        if not isinstance(text, str | None):
            raise ValueError(f"{column} has a message that is not text: {short(text)}")
        role = turn.get("role", turn.get("from"))
        turns.append(Turn(text or "", ROLES.get(str(role), role), turn.get("source"), thought_of(turn)))
    return turns


def listed_turns(text: str) -> list[Any] | None:
    """Returns the messages that a text holds as JSON; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    is_chat = isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found)
    return found if is_chat and all(turn.keys() & {"role", "from"} for turn in found) else None


def thought_of(entry: Mapping[str, Any]) -> str:
    """Returns the reasoning that an entry, or a row, holds beside its text; empty without any."""
    return next((entry[key] for key in REASONING_KEYS if isinstance(entry.get(key), str)), "").strip()


def gold_of(cell: Any, column: str) -> str:
    """Returns the gold answer in a cell: text, or a number as it is written, alone or as a list's only entry.

    Empty where the cell is. ValueError when it holds something else.
    """
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, int | float | Decimal) and not isinstance(cell, bool) and math.isfinite(cell):
        return str(cell)
    if not isinstance(cell, str | None):
        raise ValueError(f"{column} is neither a text nor a number: {short(cell)}")
    return cell or ""
