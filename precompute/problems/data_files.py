"""Rows of anybody's data files, one at a time: Parquet, JSON, CSV, compressed too, or of a Hub data set."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from precompute.config_file import short
from store.errors import ProblemsError, install_hint

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

HUB = re.compile(r"hf:(?P<name>[^:\[]+)(?::(?P<config>[^\[]+))?(?:\[(?P<split>.+)\])?")
"""`hf:openai/gsm8k:main[train]`: a data set of the Hub, its config and its split."""

BATCH_ROWS = 64
"""Rows of a Parquet file that are in memory at once; a row may hold several long solutions."""
READ_BYTES = 1 << 20
LARGEST_CSV_CELL = 1 << 30
WHITESPACE = b" \t\r\n\xef\xbb\xbf"
"""In bytes, with the mark that some programs put before UTF-8."""
LFS_POINTER = b"version https://git-lfs"

Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row]]
"""(row number from 1, row)"""
OnBad = Callable[[int, str], None]
"""Receives the number of a row that is no row, and the reason."""


def files_at(path: str | Path, *, kind: str = "data file") -> list[Path]:
    """Returns the data files that `path` names: itself, those that a glob matches, or those of the first kind
    in SUFFIXES that the directory holds, in order of their paths.

    Raises ProblemsError where there are none.
    """
    root = Path(path).absolute()
    if not root.exists() and any(sign in str(path) for sign in "*?["):
        if found := [Path(each) for each in sorted(glob(str(root), recursive=True))]:
            return found
        raise ProblemsError(f"no {kind} matches {root}")
    if not root.is_dir():
        return [root]
    below = [file for file in sorted(root.rglob("*")) if "/." not in f"/{file.relative_to(root)}"]
    # In this order, because a .json file beside Parquet or JSONL files describes them.
    for suffix in SUFFIXES:
        found = [file for file in below if suffix_of(file)[0] == suffix and file.is_file()]
        if found:
            return found
    raise ProblemsError(f"{root} holds no file that ends in {', '.join(SUFFIXES)}")


def suffix_of(file: Path) -> tuple[str, str | None]:
    """Returns the suffix of a file's kind, and its compression: `.jsonl` and `gzip` for a.jsonl.gz."""
    compression = COMPRESSIONS.get(file.suffix)
    return Path(file.stem).suffix if compression else file.suffix, compression


def data_rows(
    file: Path, *, kind: str = "data file", columns: list[str] | None = None, on_bad: OnBad | None = None
) -> Rows:
    """Yields (row number from 1, row) of a file that ends in one of SUFFIXES, or in one with .gz or .zst.

    JSON is an array of rows or has one a line, whose row number is the line's; a row that is a list of turns
    has it as its column `conversations`. Of a Parquet file only the `columns` are read, e.g.
    `reward_model.ground_truth`; None: all. Raises ProblemsError, calling the file a `kind`; a line that is no
    row goes to `on_bad` instead.
    """
    suffix, compression = suffix_of(file)
    if suffix not in SUFFIXES:
        endings = f"{', '.join(SUFFIXES)}, each also with .gz or .zst"
        raise ProblemsError(f"{file} ends in {file.suffix!r}; a {kind} ends in {endings}")

    def bad(number: int, reason: str) -> None:
        if on_bad is None:
            raise ProblemsError(f"{file}, row {number}: {reason}")
        on_bad(number, reason)

    try:
        with _opened(file, compression) as stream:
            if suffix == ".parquet":
                yield from _parquet_rows(file, stream, columns)
            else:
                yield from (_csv_rows if suffix == ".csv" else _json_rows)(file, stream, bad)
    except FileNotFoundError:
        raise ProblemsError(f"no {kind} at {file}") from None
    except OSError as error:
        raise ProblemsError(f"cannot read {file}: {error.strerror or _line(error)}") from None


def _opened(file: Path, compression: str | None) -> io.BufferedReader:
    with file.open("rb") as plain:
        if plain.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ProblemsError(f"{file} is a pointer of Git LFS, without the data: run `git lfs pull` there")
    return io.BufferedReader(pa.input_stream(str(file), compression=compression), READ_BYTES)


def _parquet_rows(file: Path, stream: io.BufferedReader, columns: list[str] | None) -> Rows:
    number = 0
    try:
        source = pa.BufferReader(stream.read()) if suffix_of(file)[1] else file.open("rb")
        with source, pq.ParquetFile(source, buffer_size=READ_BYTES) as parquet:
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise ProblemsError(f"{file} is not a readable Parquet file: {_line(error)}") from None


def _json_rows(file: Path, stream: io.BufferedReader, bad: OnBad) -> Rows:
    lines: BinaryIO = stream
    if stream.peek(1).lstrip(WHITESPACE).startswith(b"["):
        content = stream.read()
        try:
            yield from _array_rows(json.loads(content), bad)
            return
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # not a list a line either
                raise ProblemsError(f"{file} is a JSON array that breaks off or is broken: {error}") from None
        lines = io.BytesIO(content)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield from _array_rows([json.loads(line)], bad, start=number)
        except ValueError as error:
            bad(number, f"this line is not JSON: {error}")


def _array_rows(entries: list[Any], bad: OnBad, start: int = 1) -> Rows:
    for number, entry in enumerate(entries, start):
        if isinstance(entry, dict):
            yield number, entry
        elif isinstance(entry, list) and entry and all(isinstance(turn, dict) for turn in entry):
            yield number, {"conversations": entry}
        else:
            bad(number, f"a row is no JSON object: {short(entry)}")


def _csv_rows(file: Path, stream: io.BufferedReader, bad: OnBad) -> Rows:
    csv.field_size_limit(LARGEST_CSV_CELL)
    try:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
            if None in row or None in row.values():
                bad(number, f"this line has another number of cells than the header: {short(row)}")
            else:
                yield number, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ProblemsError(f"{file} is not a readable CSV file in UTF-8: {error}") from None


def hub_rows(name: str) -> Rows:
    """Yields (row number from 1, row) of a data set of the Hub such as `hf:openai/gsm8k:main[train]`.

    Raises ProblemsError where it, its config or its split cannot be had.
    """
    found = HUB.fullmatch(name)
    if found is None:
        raise ProblemsError(f"{name}: write hf:NAME, hf:NAME[SPLIT] or hf:NAME:CONFIG[SPLIT]")
    if find_spec("datasets") is None:
        raise ProblemsError(f"{name} needs the package datasets: {install_hint('hub')}")
    import datasets

    try:
        loaded = datasets.load_dataset(found["name"], found["config"], split=found["split"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ProblemsError(f"{name} cannot be loaded: {_line(error)}") from None
    if found["split"] is None:
        if len(loaded) > 1:
            raise ProblemsError(f"{name} has the splits {', '.join(loaded)}: name one, e.g. {name}[test]")
        (loaded,) = loaded.values()
    yield from enumerate(loaded, start=1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
