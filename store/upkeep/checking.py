"""`ampo store check`: does every part hold what was written into it, and what is lost where one does not?

What the manifest says is compared with what lies below `parts/`: sizes and checksums over every byte.

    whole       as the manifest says, or arrived and not yet entered, with the checksum that its name carries
    truncated   shorter than when it was written
    altered     another content
    foreign     not written by this store's writers: it has no entry, or its name carries another checksum
    missing     in the manifest, and not on the disk
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from store.format.files import disk_errors_named, make_directory, sync
from store.format.index import refresh_index
from store.format.manifest import PARTS, PartEntry, change_parts, read_manifest
from store.format.parts import READ_ERRORS, digest_in_name, entry_of, file_digest, one_line
from store.writer import StoreWriter

QUARANTINE = "quarantine"
"""Where `repair` moves what it takes out of a store: nothing is deleted."""

Progress = Callable[[int, int], None]
"""Called with (files checked, files in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One file that is not as it should be."""

    part: str
    """Its path below `parts/`."""
    fault: str
    """`truncated`, `altered`, `foreign` or `missing`."""
    detail: str
    traces: Mapping[str, int]
    """teacher -> traces that were in it, as far as the manifest knows."""
    verified: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a check found."""

    path: str
    parts: int
    """Files looked at, missing ones included."""
    bytes: int
    """Read."""
    findings: tuple[Finding, ...]
    entered: tuple[str, ...]
    """Whole parts that `repair` entered in the manifest."""
    moved: tuple[str, ...]
    """Where `repair` put what it took out, below the store."""

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

    With `repair` the store is brought in order under its write lock: what is truncated, altered or foreign
    moves to `quarantine/`, what is missing is struck out of the manifest, and whole parts without an entry
    get one. The traces lost are then drawn again by `ampo precompute teachers`, and no others.
    Raises what StoreWriter.open raises with `repair`, else what read_manifest raises.
    """
    root = Path(path).absolute()
    if not repair:
        return _examine(root, progress)
    before = read_manifest(root).parts
    with StoreWriter.reopen(root):  # which enters the parts that arrived
        entered = sorted(read_manifest(root).parts.keys() - before.keys())
        report = _examine(root, progress)
        moved = [_set_aside(root, finding.part) for finding in report.findings if finding.fault != "missing"]
        change_parts(root, add={}, drop=[finding.part for finding in report.findings])
    refresh_index(root)
    return replace(report, entered=tuple(entered), moved=tuple(moved))


def _examine(root: Path, progress: Progress | None) -> CheckReport:
    entries = read_manifest(root).parts
    there = {
        str(file.relative_to(root / PARTS)): file
        for file in sorted((root / PARTS).rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }
    names = sorted(entries.keys() | there.keys())
    findings, size = [], 0
    for done, name in enumerate(names, start=1):
        finding = _finding(name, there.get(name), entries.get(name))
        findings += [finding] if finding else []
        with suppress(KeyError, FileNotFoundError):
            size += there[name].stat().st_size
        if progress is not None:
            progress(done, len(names))
    # A part that went meanwhile was compacted away.
    known = read_manifest(root).parts
    findings = [found for found in findings if found.fault != "missing" or found.part in known]
    return CheckReport(
        path=str(root), parts=len(names), bytes=size, findings=tuple(findings), entered=(), moved=()
    )


def _finding(part: str, file: Path | None, entry: PartEntry | None) -> Finding | None:
    try:
        if file is None:
            raise FileNotFoundError
        return _unlike_entry(part, file, entry) if entry else _unentered(part, file)
    except FileNotFoundError:
        return _found(part, "missing", "there is no such file", entry) if entry else None
    except OSError as error:
        return _found(part, "altered", f"it cannot be read: {error.strerror}", entry)


def _unlike_entry(part: str, file: Path, entry: PartEntry) -> Finding | None:
    size = file.stat().st_size
    if size < entry.bytes:
        return _found(part, "truncated", f"{size:,} of {entry.bytes:,} bytes", entry)
    if size != entry.bytes or file_digest(file) != entry.blake2b:
        return _found(part, "altered", "its checksum is not the manifest's", entry)
    return None


def _unentered(part: str, file: Path) -> Finding | None:
    try:
        entry = entry_of(file)
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        return _found(part, "foreign", f"not in the manifest, and no part: {one_line(error)}", None)
    if not entry.blake2b.startswith(digest_in_name(part)):
        return _found(part, "foreign", "not in the manifest, and its name carries another checksum", None)
    return None


def _found(part: str, fault: str, detail: str, entry: PartEntry | None) -> Finding:
    return Finding(
        part=part,
        fault=fault,
        detail=detail,
        traces=entry.traces if entry else {},
        verified=entry.verified if entry else {},
    )


def _set_aside(root: Path, part: str) -> str:
    target = next(place for place in _places(root / QUARANTINE / part) if not place.exists())
    with disk_errors_named(target):
        make_directory(target.parent)
        (root / PARTS / part).replace(target)
        sync(target.parent)
    return str(target.relative_to(root))


def _places(first: Path) -> Iterator[Path]:
    """`first`, and where it is taken already `first.2`, `first.3` and so on: nothing is written over."""
    yield first
    yield from (first.with_name(f"{first.name}.{number}") for number in count(2))


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))
