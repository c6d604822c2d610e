"""The one writer of a store: problems, teachers, parts. Whatever it returned from is on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq

from store.errors import RecipeChangedError, StoreBusyError, StoreError
from store.files import WRITE_LOCK, FileLock, remove_orphans, whole_file
from store.index import refresh_index
from store.manifest import PARTS, PROBLEMS, TEACHERS, Manifest, is_fresh, read_manifest, write_manifest
from store.parts import READ_ERRORS, DamagedPart, list_parts, one_line, open_part, write_part
from store.reading import read_problems, read_teachers
from store.records import Problem, TeacherRecord, Trace
from store.schema import PARQUET_OPTIONS, problems_table, teacher_json


class StoreWriter:
    """Appends to a store under an exclusive lock; readers need none and see whole parts only."""

    def __init__(self, root: Path, manifest: Manifest, lock: FileLock) -> None:
        self.path = root
        self.manifest = manifest
        self._lock = lock
        self._fingerprints = {
            name: record.generation_fingerprint for name, record in read_teachers(root).items()
        }

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verifier: str, verifier_version: str) -> Self:
        """Makes a store at `path`, or opens the one there, and takes its write lock.

        What a killed writer left half-written is removed.
        Raises StoreForeignError, StoreNewerError, StoreDamagedError, StoreBusyError, and StoreError when
        the directory cannot be written or another verifier judged the traces there.
        """
        root = Path(path).absolute()
        is_fresh(root)
        with ExitStack() as undo:
            lock = _lock(root)
            undo.callback(lock.release)
            remove_orphans(root)
            if is_fresh(root):
                write_manifest(root, verifier=verifier, verifier_version=verifier_version)
            manifest = read_manifest(root)
            _check_verifier(root, manifest, verifier, verifier_version)
            writer = cls(root, manifest, lock)
            undo.pop_all()
        return writer

    @classmethod
    def peek(cls, path: str | os.PathLike[str], *, verifier: str, verifier_version: str) -> Self | None:
        """For looking only: `done`, `damaged` and `check_recipe` of what `open` would write to, without the
        lock and without touching anything; None where `open` would make a new store.

        Raises what `open` raises, StoreBusyError apart.
        """
        root = Path(path).absolute()
        if is_fresh(root):
            _check_writable(root)
            return None
        manifest = read_manifest(root)
        _check_verifier(root, manifest, verifier, verifier_version)
        _check_writable(root)
        return cls(root, manifest, FileLock(root / WRITE_LOCK))

    def write_problems(self, problems: Sequence[Problem]) -> None:
        """Adds the problems that are not there yet and renews the source and system prompt of those that
        are; the order of arrival stays."""
        before = {problem.problem_id: problem for problem in read_problems(self.path)}
        merged = before | {problem.problem_id: problem for problem in problems}
        if merged == before:
            return
        with whole_file(self.path / PROBLEMS) as file:
            table = problems_table(list(merged.values()))
            pq.write_table(table, file, **PARQUET_OPTIONS | {"row_group_size": 4096})

    def register_teacher(self, record: TeacherRecord) -> None:
        """Files the teacher's recipe; traces can be appended under its name from now on.

        Raises RecipeChangedError when there are traces under this name from another recipe. The same
        recipe from another engine is fine: the file then names the engine used last.
        """
        if record.name != Path(record.name).name or record.name.startswith("."):
            raise ValueError(f"teacher name {record.name!r} cannot be a file name")
        self.check_recipe(record)
        with whole_file(self.path / TEACHERS / f"{record.name}.json") as file:
            file.write((json.dumps(teacher_json(record), indent=2, ensure_ascii=False) + "\n").encode())
        self._fingerprints[record.name] = record.generation_fingerprint

    def check_recipe(self, record: TeacherRecord) -> None:
        """Raises RecipeChangedError when there are traces under this name from another recipe."""
        directory = self.path / PARTS / record.name
        made = self._made_with(record.name)
        if made is None or made == record.generation_fingerprint:
            return
        known = read_teachers(self.path).get(record.name)
        changes = f"generation_fingerprint {made} -> {record.generation_fingerprint}"
        if known is not None and known.generation_fingerprint == made:
            changes = "; ".join(recipe_changes(known.recipe, record.recipe))
        raise RecipeChangedError(
            f"teacher {record.name!r} has traces in {self.path} from another recipe: {changes}; "
            f"give the teacher a new name, or remove {directory}"
        )

    def _made_with(self, teacher: str) -> str | None:
        """The fingerprint of the traces on disk, from the traces themselves; None without a readable one."""
        for part in self._parts_of(teacher):
            try:
                with open_part(self.path / PARTS / part) as file:
                    column = file.read_row_group(0, columns=["generation_fingerprint"], use_threads=False)
                return str(column["generation_fingerprint"][0])
            except READ_ERRORS:
                continue
        return None

    def append(self, traces: Sequence[Trace]) -> Path | None:
        """Writes one part with the traces, which must be of one registered teacher and not yet in the
        store (`done` tells); returns its path, or None when there is nothing to write.

        The part is durable and visible to readers on return; before, nothing of it is.
        """
        if not traces:
            return None
        names = sorted({trace.teacher for trace in traces})
        if len(names) > 1:
            raise ValueError(f"a part holds one teacher's traces, not those of {', '.join(names)}")
        fingerprint = self._fingerprints.get(names[0])
        for trace in traces:
            if trace.generation_fingerprint != fingerprint:
                raise ValueError(
                    f"trace {trace.trace_id} has recipe {trace.generation_fingerprint}, "
                    f"teacher {names[0]!r} is registered with {fingerprint}"
                )
        return write_part(self.path, traces)

    def done(self, teacher: str) -> dict[str, dict[int, bool]]:
        """What the parts hold: for each problem_id, sample_index -> is_correct.

        A damaged part counts as not there, so that its traces are made again; `damaged` names it.
        """
        found: dict[str, dict[int, bool]] = {}
        for part in self._parts_of(teacher):
            try:
                for problem_id, sample_index, is_correct in _keys(self.path / PARTS / part):
                    found.setdefault(problem_id, {})[sample_index] = is_correct
            except READ_ERRORS:
                continue
        return found

    def damaged(self, teacher: str) -> list[DamagedPart]:
        """The teacher's parts that cannot be read."""
        broken = []
        for part in self._parts_of(teacher):
            try:
                list(_keys(self.path / PARTS / part))
            except READ_ERRORS as error:
                broken.append(DamagedPart(part=part, reason=one_line(error)))
        return broken

    def _parts_of(self, teacher: str) -> list[str]:
        return [part for part in list_parts(self.path) if part.startswith(f"{teacher}/")]

    def close(self) -> None:
        """Releases the write lock."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            refresh_index(self.path)


def _lock(root: Path) -> FileLock:
    lock = FileLock(root / WRITE_LOCK)
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(wait=False)
    except OSError as error:
        raise StoreError(f"cannot write to the store at {root}: {error.strerror}") from error
    if not held:
        pid = lock.holder()
        raise StoreBusyError(
            f"{root} is being written by {f'process {pid}' if pid else 'another process'}; "
            "wait for it to end, or set store.path to another directory"
        )
    return lock


def _check_writable(root: Path) -> None:
    existing = next(parent for parent in (root, *root.parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(f"cannot write to the store at {root}: no permission to write in {existing}")


def _check_verifier(root: Path, manifest: Manifest, verifier: str, version: str) -> None:
    # Verdicts of two judges in one store would be the same lie as two recipes under one name.
    if (manifest.verifier, manifest.verifier_version) != (verifier, version):
        raise StoreError(
            f"{root} holds verdicts of {manifest.verifier} {manifest.verifier_version}, this is "
            f"{verifier} {version}; install that version, or set store.path to a new directory"
        )


def _keys(path: Path) -> Iterator[tuple[str, int, bool]]:
    with open_part(path) as file:
        table = file.read(columns=["problem_id", "sample_index", "is_correct"], use_threads=False)
    columns = [table.column(name).to_pylist() for name in ("problem_id", "sample_index", "is_correct")]
    return zip(*columns, strict=True)


def recipe_changes(old: Mapping[str, Any], new: Mapping[str, Any], under: str = "") -> list[str]:
    """`sampling.temperature 0.7 -> 1.0` for every field that differs, cut to where it differs."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += recipe_changes(before, after, f"{under}{key}.")
        elif before != after:
            changes.append(f"{under}{key} {' -> '.join(_excerpts(before, after))}")
    return changes


def _excerpts(before: object, after: object, width: int = 40) -> tuple[str, str]:
    """Both values as reprs, long ones cut to a window around the first character that differs."""
    if not (isinstance(before, str) and isinstance(after, str)):
        return repr(before), repr(after)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    start = max(0, same - width // 4) if max(len(before), len(after)) > width else 0

    def cut(text: str) -> str:
        end = start + width
        return f"{'...' if start else ''}{text[start:end]!r}{'...' if end < len(text) else ''}"

    return cut(before), cut(after)
