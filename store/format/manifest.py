"""`manifest.json`, which makes a directory a store, and the names of the other files.

    {"schema_version": 3, "verifiers": {"math-verify": "0.9.0+ampo.1"}, "created": "2026-...",
     "parts": {"ada/part-000001-47aa77ca00112233.parquet": {"bytes": 3863, "blake2b": "47aa77ca...",
                                                            "traces": {"ada": 3}, "verified": {"ada": 2}}}}

A part has the beginning of its checksum in its name, so the manifest can be completed after a crash between
the part's rename and its entry. The manifest alone shows that a part is missing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from store.errors import (
    StoreDamagedError,
    StoreError,
    StoreForeignError,
    StoreMissingError,
    StoreVersionError,
)
from store.format.files import MANIFEST_LOCK, TMP_MARK, FileLock, whole_file
from store.format.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"
PROBLEMS = "problems.parquet"
TEACHERS = "teachers"
PARTS = "parts"
INDEX = "index.duckdb"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartEntry:
    """A part in the manifest."""

    bytes: int
    blake2b: str
    """32 hex digits over the file's bytes."""
    traces: Mapping[str, int]
    """teacher -> traces in the part."""
    verified: Mapping[str, int]
    """teacher -> verified traces among them; teachers without one are missing."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The verifiers of the traces, the schema, and the checksum of every part."""

    schema_version: int
    verifiers: Mapping[str, str]
    """Name -> version, e.g. of `math-verify`."""
    created: str
    """ISO 8601, UTC."""
    parts: Mapping[str, PartEntry] = field(default_factory=dict)
    """By the path below `parts/`."""

    @property
    def verified_by(self) -> str:
        """Names and versions of the verifiers in one line."""
        return ", ".join(f"{name} {version}" for name, version in self.verifiers.items())


def is_fresh(root: Path) -> bool:
    """Returns whether a store may be made at `root`: nothing exists there, or an empty directory.

    Raises StoreForeignError for a file or a directory with other content, and StoreError for a path with a
    character of patterns.
    """
    if mark := next((mark for mark in "?*[" if mark in str(root)), None):
        # To DuckDB they are patterns.
        raise StoreError(f"{root}: a store's path (store.path) cannot contain {mark!r}; name another")
    if not root.exists():
        return True
    if not root.is_dir():
        raise StoreForeignError(f"{root} is a file; a trace store is a directory (store.path)")
    if (root / MANIFEST).exists():
        return False
    names = sorted(entry.name for entry in root.iterdir())
    # A killed writer may leave locks and half-written files before the manifest.
    strange = [name for name in names if not (name.startswith(TMP_MARK) or name.endswith(".lock"))]
    if strange:
        raise StoreForeignError(
            f"{root} is not a trace store: it contains {strange[0]} but no {MANIFEST}; "
            "set store.path to a store, or to a new directory"
        )
    return True


def read_manifest(root: Path) -> Manifest:
    """Returns the manifest of the store at `root`.

    Raises StoreMissingError, StoreForeignError, StoreVersionError or StoreDamagedError.
    """
    if is_fresh(root):
        raise StoreMissingError(
            f"no trace store at {root}; make one with `ampo precompute teachers`, "
            "or with `ampo store import` from existing traces"
        )
    path = root / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreDamagedError(
            f"{path} cannot be read: {error}; restore it, or move {root} aside and "
            "run `ampo precompute teachers` or `ampo store import`"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("schema_version"), int):
        raise StoreForeignError(f"{path} is not a trace store's: it has no schema_version")
    if content["schema_version"] != SCHEMA_VERSION:
        raise StoreVersionError(
            f"{root} has schema version {content['schema_version']}, this ampo reads {SCHEMA_VERSION}; "
            "install the ampo that wrote it, or set store.path to a new directory"
        )
    try:
        parts = {part: PartEntry(**entry) for part, entry in content["parts"].items()}
        return Manifest(**content | {"parts": parts})
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreDamagedError(f"{path} is broken: {error}; restore the file from a copy") from error


def create_manifest(root: Path, *, verifiers: Mapping[str, str]) -> None:
    """Makes `root` a store, unless another writer has done so meanwhile."""
    with FileLock(root / MANIFEST_LOCK):
        if is_fresh(root):
            created = datetime.now(UTC).isoformat(timespec="seconds")
            _write(root, Manifest(SCHEMA_VERSION, verifiers, created))


def change_verifiers(root: Path, verifiers: Mapping[str, str]) -> None:
    """Records other verifiers; safe among several writers."""
    with FileLock(root / MANIFEST_LOCK):
        _write(root, replace(read_manifest(root), verifiers=dict(verifiers)))


def _write(root: Path, manifest: Manifest) -> None:
    """Writes the whole file; requires the manifest's lock."""
    with whole_file(root / MANIFEST) as file:
        file.write((json.dumps(asdict(manifest), indent=1) + "\n").encode())


def change_parts(root: Path, *, add: Mapping[str, PartEntry], drop: Collection[str] = ()) -> None:
    """Adds and removes parts at one moment; safe among several writers."""
    with FileLock(root / MANIFEST_LOCK):
        manifest = read_manifest(root)
        kept = {part: entry for part, entry in manifest.parts.items() if part not in drop}
        _write(root, replace(manifest, parts=kept | dict(add)))
