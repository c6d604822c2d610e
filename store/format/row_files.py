"""Rows in a .parquet or .jsonl file, for other programs to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import UserError
from store.format.files import whole_file
from store.format.parts import one_line

SUFFIXES = (".parquet", ".jsonl")
ROWS_AT_ONCE = 256
"""Rows in memory, and of a Parquet row group."""


def write_rows(out: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema | None = None) -> int:
    """Writes rows to the file of `--out`, which appears whole or not at all; returns their number.

    `schema`: of a Parquet file; None: that of the first ROWS_AT_ONCE rows. Raises UserError for another
    suffix and for rows of different types, and StoreError when the disk is full.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: give a file that ends in {' or '.join(SUFFIXES)}")
    remaining, written, writer = iter(rows), 0, None
    with whole_file(out) as file, ExitStack() as stack:
        while batch := list(islice(remaining, ROWS_AT_ONCE)):
            written += len(batch)
            if out.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch)
                continue
            try:
                table = pa.Table.from_pylist(batch, schema)
            except pa.ArrowException as error:
                raise UserError(f"--out {out}: rows of different types: {one_line(error)}") from error
            schema = table.schema
            writer = writer or stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
            writer.write_table(table)
    return written
