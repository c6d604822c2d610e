"""The one writer of a store: problems, teachers, parts. When a method returns, its data is on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq

from store.errors import RecipeChangedError, StoreBusyError, StoreError
from store.format.files import (
    MANIFEST_LOCK,
    WRITE_LOCK,
    FileLock,
    check_writable,
    disk_errors_named,
    make_directory,
    remove_orphans,
    shard_lock,
    whole_file,
)
from store.format.index import open_index, refresh_index
from store.format.manifest import (
    PARTS,
    PROBLEMS,
    TEACHERS,
    Manifest,
    PartEntry,
    change_parts,
    change_verifiers,
    create_manifest,
    is_fresh,
    read_manifest,
)
from store.format.parts import (
    ALL,
    READ_ERRORS,
    DamagedPart,
    digest_in_name,
    entry_of,
    list_parts,
    write_part,
)
from store.format.reading import read_problems, read_teachers
from store.format.schema import PARQUET_OPTIONS, PROBLEM_SCHEMA, TRACE_SCHEMA, table_of, teacher_json
from store.records import Problem, TeacherRecord, Trace

REVERIFY = "`ampo store reverify` with this config verifies the stored texts again, without sampling"
"""The way out where verdicts are of another verifier."""


class StoreWriter:
    """Appends to a store under an exclusive lock; readers need none and see whole parts only.

    Writers of different shards may share the store, each alone in its shard, and exclude a writer without
    shard. Their traces must not overlap.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.path = root
        self.manifest = manifest
        self._locks = ExitStack()
        self._fingerprints = {
            name: record.generation_fingerprint for name, record in read_teachers(root).items()
        }

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verifiers: Mapping[str, str], shard: str | None = None
    ) -> Self:
        """Opens or makes the store at `path` and takes its write lock.

        With `shard`, a name such as `1-of-4`, it takes the lock of that shard alone. Half-written files of a
        killed writer are removed; its whole parts are entered in the manifest.
        Raises StoreForeignError, StoreVersionError, StoreDamagedError, StoreBusyError, and
        StoreError when the directory cannot be written or has verdicts of another version of a verifier.
        `verifiers`: name -> version of those that will be used.
        """
        root = Path(path).absolute()
        is_fresh(root)
        with ExitStack() as locks:
            _take_locks(locks, root, shard)
            if shard is None:
                with disk_errors_named(root):
                    remove_orphans(root)
            create_manifest(root, verifiers=verifiers)
            manifest = read_manifest(root)
            check_versions(root, manifest, verifiers)
            if not verifiers.keys() <= manifest.verifiers.keys():
                change_verifiers(root, {**manifest.verifiers, **verifiers})
            _enter_parts(root, manifest)
            writer = cls(root, manifest)
            writer._locks = locks.pop_all()
        return writer

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> Self:
        """Opens the existing store at `path`, of any verifiers. Raises what `open` and read_manifest do."""
        return cls.open(path, verifiers=read_manifest(Path(path).absolute()).verifiers)

    @classmethod
    def peek(cls, path: str | os.PathLike[str], *, verifiers: Mapping[str, str]) -> Self | None:
        """Returns a writer without lock for `done`, `damaged` and `check_recipe` alone; touches no file.

        None where `open` would make a new store. Raises what `open` raises, except StoreBusyError.
        """
        root = Path(path).absolute()
        if is_fresh(root):
            check_writable(root, named="the store")
            return None
        manifest = read_manifest(root)
        check_versions(root, manifest, verifiers)
        check_writable(root, named="the store")
        return cls(root, manifest)

    def write_problems(self, problems: Sequence[Problem], *, drop: Collection[str] = ()) -> None:
        """Adds new problems, updates source and system prompt of known ones; the order of arrival stays.

        `drop`: ids of problems that are removed.
        """
        with FileLock(self.path / MANIFEST_LOCK):  # shards write the same problems at the same time
            before = {problem.problem_id: problem for problem in read_problems(self.path)}
            merged = before | {problem.problem_id: problem for problem in problems}
            merged = {problem_id: problem for problem_id, problem in merged.items() if problem_id not in drop}
            if merged == before:
                return
            with whole_file(self.path / PROBLEMS) as file:
                pq.write_table(table_of(list(merged.values()), PROBLEM_SCHEMA), file, **PARQUET_OPTIONS)

    def register_teacher(self, record: TeacherRecord) -> None:
        """Stores the teacher's record, which must precede its traces.

        Raises RecipeChangedError for traces of this name from another recipe. The same recipe may come from
        another engine: the record then names the engine used last.
        """
        if record.name in (ALL, "") or "/" in record.name or record.name.startswith("."):
            raise StoreError(
                f"a teacher cannot be named {record.name!r}: its parts are in parts/NAME, compacted ones in "
                f"parts/{ALL}"
            )
        self.check_recipe(record)
        with whole_file(self.path / TEACHERS / f"{record.name}.json") as file:
            file.write((json.dumps(teacher_json(record), indent=2, ensure_ascii=False) + "\n").encode())
        self._fingerprints[record.name] = record.generation_fingerprint

    def check_recipe(self, record: TeacherRecord) -> None:
        """Raises RecipeChangedError for traces of this name from another recipe."""
        sql = "SELECT generation_fingerprint AS made FROM idx.rows WHERE teacher = $teacher LIMIT 1"
        made = "".join(row["made"] for row in self._rows(sql, record.name))
        if made in ("", record.generation_fingerprint):
            return
        known = read_teachers(self.path).get(record.name)
        changes = f"generation_fingerprint {made} -> {record.generation_fingerprint}"
        if known is not None and known.generation_fingerprint == made:
            changes = "; ".join(recipe_changes(known.recipe, record.recipe))
        raise RecipeChangedError(
            f"teacher {record.name!r} has traces in {self.path} from another recipe: {changes}; "
            f"give the teacher a new name, or remove them: `ampo store forget {self.path} "
            f"--teacher {record.name}`"
        )

    def append(self, traces: Sequence[Trace]) -> Path | None:
        """Writes one part; returns its path, or None without traces.

        The traces must be of registered teachers and new to the store (see `done`). The part is durable
        and visible to readers on return, and invisible before.
        """
        if not traces:
            return None
        for trace in traces:
            fingerprint = self._fingerprints.get(trace.teacher)
            if trace.generation_fingerprint != fingerprint:
                raise ValueError(
                    f"trace {trace.trace_id} has recipe {trace.generation_fingerprint}, "
                    f"teacher {trace.teacher!r} is registered with {fingerprint}"
                )
        part, entry = write_part(self.path, table_of(traces, TRACE_SCHEMA))
        change_parts(self.path, add={part: entry})
        return self.path / PARTS / part

    def done(self, teacher: str) -> dict[str, dict[int, bool]]:
        """Returns the stored samples: problem_id -> sample_index -> is_usable.

        Traces of a damaged part are missing, so that they are sampled again; `damaged` names it.
        """
        found: dict[str, dict[int, bool]] = {}
        sql = "SELECT problem_id, sample_index, is_usable FROM idx.traces WHERE teacher = $teacher"
        for row in self._rows(sql, teacher):
            found.setdefault(row["problem_id"], {})[row["sample_index"]] = row["is_usable"]
        return found

    def damaged(self, teacher: str) -> list[DamagedPart]:
        """Returns the unreadable and the missing parts with traces of the teacher."""
        entries, present = read_manifest(self.path).parts, list_parts(self.path)
        with open_index(self.path) as index:
            broken = list(index.damaged())
        broken += [DamagedPart(part=part, reason="it is missing") for part in entries if part not in present]
        return [each for each in broken if _may_contain(each.part, entries, teacher)]

    def _rows(self, sql: str, teacher: str) -> list[dict[str, Any]]:
        with open_index(self.path) as index:
            return index.rows(sql, {"teacher": teacher})

    def close(self) -> None:
        """Releases the lock."""
        self._locks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None:
            refresh_index(self.path)


def _enter_parts(root: Path, manifest: Manifest) -> None:
    """Enters parts without an entry, from killed writers, if they match the checksum in their name."""
    arrived = {}
    for part in list_parts(root):
        if part not in manifest.parts:
            with suppress(*READ_ERRORS):
                entry = entry_of(root / PARTS / part)
                if entry.blake2b.startswith(digest_in_name(part)):
                    arrived[part] = entry
    if arrived:
        change_parts(root, add=arrived)


def _may_contain(part: str, parts: Mapping[str, PartEntry], teacher: str) -> bool:
    return teacher in parts[part].traces if part in parts else part.startswith((f"{teacher}/", f"{ALL}/"))


def _take_locks(stack: ExitStack, root: Path, shard: str | None) -> None:
    """Takes the locks of a writer of the store or of one shard; the stack releases them.

    Raises StoreBusyError and StoreError.
    """
    locks = [FileLock(root / WRITE_LOCK, shared=shard is not None)]
    if shard is not None:
        locks.append(FileLock(root / shard_lock(shard)))
    for lock in locks:
        with disk_errors_named(root):
            make_directory(root)
            acquired = lock.acquire(wait=False)
        if not acquired:
            pid = lock.holder()
            raise StoreBusyError(
                f"{root} is being written by {f'process {pid}' if pid else 'another process'}; "
                "wait for it to end, or set store.path to another directory"
            )
        stack.callback(lock.release)


def check_versions(root: Path, manifest: Manifest, verifiers: Mapping[str, str]) -> None:
    """Raises StoreError where the store has verdicts of another version of one of the `verifiers`."""
    for name, version in verifiers.items():
        stored = manifest.verifiers.get(name, version)
        if stored != version:
            raise StoreError(
                f"{root} has verdicts of {name} {stored}, this is {name} {version}; {REVERIFY}, or set "
                "store.path to a new directory"
            )


def recipe_changes(old: Mapping[str, Any], new: Mapping[str, Any], under: str = "") -> list[str]:
    """Returns `sampling.temperature 0.7 -> 1.0` for every changed field, long texts cut to the difference."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += recipe_changes(before, after, f"{under}{key}.")
        elif before != after:
            changes.append(f"{under}{key} {' -> '.join(_excerpts(before, after))}")
    return changes


def _excerpts(before: object, after: object) -> list[str]:
    """Returns both values as reprs, texts cut to 40 characters around the first difference."""
    if not (isinstance(before, str) and isinstance(after, str)):
        return [repr(before), repr(after)]
    pairs = enumerate(zip(before, after, strict=False))
    start = max(0, next((at for at, (one, other) in pairs if one != other), 0) - 10)
    return [f"{'...' if start else ''}{text[start : start + 40]!r}" for text in (before, after)]
