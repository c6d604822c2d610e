"""`ampo store migrate`: a store of an earlier schema, written anew in this one.

    1 -> 2   columns verdict_detail, parsed_answer, parsed_gold, filtered; pages instead of row groups of 8;
             checksums in the names of parts and in the manifest

New parts come to stand beside the old ones, and the manifest that names them makes them the store: before
that moment it is the old store, after it the new. A migration that is killed is begun again by the command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from store.format.files import MANIFEST_LOCK, FileLock, disk_errors_named, remove_orphans
from store.format.index import refresh_index
from store.format.manifest import PARTS, PartEntry, check_version, manifest_of, read_content, write_manifest
from store.format.parts import (
    READ_ERRORS,
    DamagedPart,
    list_parts,
    one_line,
    open_part,
    remove_parts,
    write_part,
)
from store.format.schema import SCHEMA_VERSION, TRACE_SCHEMA
from store.writer import take_locks

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""

_OLD_NAME = re.compile(r"part-\d+-[0-9a-f]{8}\.parquet")
"""How schema 1 named a part; later names carry twice as many digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """What a migration did."""

    from_version: int
    to_version: int
    parts: int
    """Rewritten; 0 when the store is of this version."""
    traces: int
    damaged: tuple[DamagedPart, ...]
    """Left where they are: they cannot be read. `ampo store check --repair` sets them aside."""


def migrate(path: str | os.PathLike[str], *, progress: Progress | None = None) -> MigrationReport:
    """Brings the store at `path` to this version's schema.

    Raises StoreMissingError, StoreForeignError, StoreNewerError, StoreBusyError, and StoreError when the disk
    is full: the store is then as before.
    """
    root = Path(path).absolute()
    version = read_content(root)["schema_version"]
    if version >= SCHEMA_VERSION:
        check_version(root, version)
    with ExitStack() as held:
        for lock in take_locks(root, None):
            held.callback(lock.release)
        with disk_errors_named(root):
            remove_orphans(root)
        report = _rewrite(root, progress)
    refresh_index(root)
    return report


def _rewrite(root: Path, progress: Progress | None) -> MigrationReport:
    content = read_content(root)
    old = [part for part in list_parts(root) if _OLD_NAME.fullmatch(Path(part).name)]
    if content["schema_version"] == SCHEMA_VERSION:
        # Left by a migration that was killed at its very end; what it could not read is no leftover.
        remove_parts(root, [part for part in old if _is_readable(root / PARTS / part)])
        return MigrationReport(
            from_version=SCHEMA_VERSION, to_version=SCHEMA_VERSION, parts=0, traces=0, damaged=()
        )
    remove_parts(root, [part for part in list_parts(root) if part not in old])
    new: dict[str, PartEntry] = {}
    damaged: list[DamagedPart] = []
    for done, part in enumerate(old, start=1):
        try:
            table = _in_this_schema(root / PARTS / part)
        except READ_ERRORS as error:
            damaged.append(DamagedPart(part=part, reason=one_line(error)))
            continue
        name, entry = write_part(root, table)
        new[name] = entry
        if progress is not None:
            progress(done, len(old))
    with FileLock(root / MANIFEST_LOCK):
        manifest = manifest_of(root, content | {"schema_version": SCHEMA_VERSION, "parts": {}})
        write_manifest(root, replace(manifest, parts=new))
    broken = {part.part for part in damaged}
    remove_parts(root, [part for part in old if part not in broken])
    return MigrationReport(
        from_version=content["schema_version"],
        to_version=SCHEMA_VERSION,
        parts=len(new),
        traces=sum(sum(entry.traces.values()) for entry in new.values()),
        damaged=tuple(damaged),
    )


def _is_readable(path: Path) -> bool:
    with suppress(*READ_ERRORS):
        _in_this_schema(path)
        return True
    return False


def _in_this_schema(path: Path) -> pa.Table:
    with open_part(path) as file:
        old = file.read(use_threads=False)
    there = set(old.schema.names)
    absent: dict[str, Any] = {"verdict_detail": ""}
    columns = [
        old[field.name].cast(field.type)
        if field.name in there
        else pa.array([absent.get(field.name)] * old.num_rows, field.type)
        for field in TRACE_SCHEMA
    ]
    return pa.table(columns, TRACE_SCHEMA)
