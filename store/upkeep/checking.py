"""`ampo store check`: compares every byte below `parts/` with the manifest, and repairs the store.

whole       as in the manifest, or not entered yet, with the checksum in its name
truncated   shorter than when it was written
altered     another content
foreign     not written by this store's writers: without entry, or with another checksum in its name
missing     in the manifest, and not on the disk
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from store.format.files import disk_errors_named, make_directory, sync
from store.format.index import Progress, refresh_index
from store.format.manifest import PARTS, PartEntry, change_parts, read_manifest
from store.format.parts import READ_ERRORS, digest_in_name, entry_of, file_digest, one_line
from store.writer import StoreWriter

QUARANTINE = "quarantine"
"""Directory to which `repair` moves files: it deletes none."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A file that is not as in the manifest."""

    part: str
    """Its path below `parts/`."""
    fault: str
    """`truncated`, `altered`, `foreign` or `missing`."""
    detail: str
    traces: Mapping[str, int]
    """teacher -> traces that were in it, by the manifest."""
    verified: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Result of a check."""

    path: str
    parts: int
    """Number of files, missing ones included."""
    bytes: int
    """Size of the present files."""
    findings: tuple[Finding, ...]
    entered: tuple[str, ...] = ()
    """Whole parts that `repair` entered in the manifest."""
    moved: tuple[str, ...] = ()
    """Paths of the files that `repair` moved, below the store."""

    @property
    def lost(self) -> dict[str, int]:
        """teacher -> traces lost."""
        return _sum(finding.traces for finding in self.findings)

    @property
    def lost_verified(self) -> dict[str, int]:
        """teacher -> verified traces lost."""
        return _sum(finding.verified for finding in self.findings)


def check(
    path: str | os.PathLike[str], *, repair: bool = False, progress: Progress | None = None
) -> CheckReport:
    """Reads every byte of every part of the store at `path`.

    `repair`, under the write lock: truncated, altered and foreign files move to `quarantine/`, missing parts
    leave the manifest, and whole parts without an entry get one. `ampo precompute teachers` then samples the
    lost traces again, and no others.
    Raises what StoreWriter.open raises with `repair`, else what read_manifest raises.
    """
    root = Path(path).absolute()
    if not repair:
        return _examine(root, progress)
    before = read_manifest(root).parts
    with StoreWriter.reopen(root):  # which enters whole parts
        entered = sorted(read_manifest(root).parts.keys() - before.keys())
        report = _examine(root, progress)
        moved = [_quarantine(root, finding.part) for finding in report.findings if finding.fault != "missing"]
        change_parts(root, add={}, drop=[finding.part for finding in report.findings])
    refresh_index(root)
    return replace(report, entered=tuple(entered), moved=tuple(moved))


def _examine(root: Path, progress: Progress | None) -> CheckReport:
    entries = read_manifest(root).parts
    present: dict[str, int] = {}
    for file in (root / PARTS).rglob("*"):
        with suppress(FileNotFoundError):  # removed by a compaction
            if file.is_file() and not file.name.startswith("."):
                present[str(file.relative_to(root / PARTS))] = file.stat().st_size
    names = sorted(entries.keys() | present.keys())
    findings = []
    for done, name in enumerate(names, start=1):
        entry = entries.get(name)
        if fault := _fault(root / PARTS / name, entry):
            lost = (entry.traces, entry.verified) if entry else ({}, {})
            findings.append(Finding(name, *fault, *lost))
        if progress is not None:
            progress(done, len(names))
    # A compaction may have removed parts meanwhile.
    known = read_manifest(root).parts
    real = [found for found in findings if found.fault != "missing" or found.part in known]
    return CheckReport(path=str(root), parts=len(names), bytes=sum(present.values()), findings=tuple(real))


def _fault(file: Path, entry: PartEntry | None) -> tuple[str, str] | None:
    """Returns the fault of a file and its detail; None for a whole one."""
    try:
        if entry is None:
            found = entry_of(file)
            if found.blake2b.startswith(digest_in_name(file.name)):
                return None
            return "foreign", "not in the manifest, and its name carries another checksum"
        size = file.stat().st_size
        if size < entry.bytes:
            return "truncated", f"{size:,} of {entry.bytes:,} bytes"
        if size == entry.bytes and file_digest(file) == entry.blake2b:
            return None
        return "altered", "its checksum is not the manifest's"
    except FileNotFoundError:
        return ("missing", "there is no such file") if entry else None
    except READ_ERRORS as error:
        if entry is None:
            return "foreign", f"not in the manifest, and no part: {one_line(error)}"
        return "altered", f"it cannot be read: {one_line(error)}"


def _quarantine(root: Path, part: str) -> str:
    """Moves a file to `quarantine/`, under a new name where one of this name exists; returns its path."""
    first = root / QUARANTINE / part
    names = (first.with_name(f"{first.name}.{number}") for number in count(2))
    target = first if not first.exists() else next(name for name in names if not name.exists())
    with disk_errors_named(target):
        make_directory(target.parent)
        (root / PARTS / part).replace(target)
        sync(target.parent)
    return str(target.relative_to(root))


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))
