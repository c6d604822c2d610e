"""What makes a directory a store: `manifest.json`, and the places of everything else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from store.errors import StoreDamagedError, StoreForeignError, StoreMissingError, StoreNewerError
from store.files import is_bookkeeping, whole_file
from store.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"
PROBLEMS = "problems.parquet"
TEACHERS = "teachers"
PARTS = "parts"
INDEX = "index.duckdb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Who judged the traces, and in which form they are written."""

    schema_version: int
    verifier: str
    """e.g. `math-verify`"""
    verifier_version: str
    created: str
    """ISO 8601, UTC."""


def is_fresh(root: Path) -> bool:
    """Whether a store may be made at `root`: nothing is there, or an empty directory.

    Raises StoreForeignError for a file, or for a directory that holds something else.
    """
    if not root.exists():
        return True
    if not root.is_dir():
        raise StoreForeignError(f"{root} is a file; a trace store is a directory (store.path)")
    if (root / MANIFEST).exists():
        return False
    strange = sorted(entry.name for entry in root.iterdir() if not is_bookkeeping(entry.name))
    if strange:
        raise StoreForeignError(
            f"{root} is no trace store: it holds {strange[0]} but no {MANIFEST}; "
            "set store.path to a store, or to a new directory"
        )
    return True


def read_manifest(root: Path) -> Manifest:
    """The manifest of the store at `root`.

    Raises StoreMissingError, StoreForeignError, StoreNewerError or StoreDamagedError.
    """
    if is_fresh(root):
        raise StoreMissingError(f"no trace store at {root}; make one with `ampo precompute teachers`")
    path = root / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreDamagedError(
            f"{path} cannot be read: {error}; restore it, or move {root} aside and "
            "run `ampo precompute teachers`"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("schema_version"), int):
        raise StoreForeignError(f"{path} is not a trace store's: it names no schema_version")
    if content["schema_version"] > SCHEMA_VERSION:
        raise StoreNewerError(
            f"{root} has schema version {content['schema_version']}, this ampo reads up to "
            f"{SCHEMA_VERSION}; install a later ampo"
        )
    return _manifest_of(path, content)


def _manifest_of(path: Path, content: dict[str, object]) -> Manifest:
    missing = [name for name in Manifest.__dataclass_fields__ if name not in content]
    if missing:
        raise StoreDamagedError(f"{path} has no {missing[0]!r}; restore the file from a copy")
    return Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})  # type: ignore[arg-type]


def write_manifest(root: Path, *, verifier: str, verifier_version: str) -> Manifest:
    """Makes `root` a store, now."""
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        verifier=verifier,
        verifier_version=verifier_version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with whole_file(root / MANIFEST) as file:
        file.write((json.dumps(asdict(manifest), indent=2) + "\n").encode())
    return manifest
