"""Faults at chosen system calls, and the laws that a store obeys after any of them.

A child process makes the calls that change a disk; at the N-th of them it is killed (half-way where the call
writes) or is told that the disk is full, read-only or broken. `run` says what became of it.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from store_examples import JUDGE, make_store, problem, teacher, trace, wrong

from store.errors import StoreError
from store.format.files import TMP_MARK
from store.format.manifest import MANIFEST, PARTS, read_manifest
from store.format.parts import list_parts, part_rows
from store.reader import TraceStore
from store.records import Trace
from store.upkeep.checking import check
from store.upkeep.compaction import compact, forget
from store.writer import StoreWriter

KILL = 0
"""The fault that is no error: SIGKILL."""

CALLS = ("mkdir", "unlink", "truncate", "pwrite", "open", "fsync", "replace")
"""Functions of `os` through which the store changes a disk; beside them flock, and what files write."""

Key = tuple[str, str, int]
Contents = dict[Key, Trace]
"""(problem_id, teacher, sample_index) -> the trace"""


class Faults:
    """Counts the calls that change a disk; the N-th fails."""

    def __init__(self, at: int, fault: int) -> None:
        self.calls: list[str] = []
        self._at = at
        self._fault = fault
        self._paths: dict[int, str] = {}

    def install(self) -> None:
        """For good: only a child may."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        fcntl.flock = self._counted("flock", fcntl.flock)
        plain = io.open

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return plain(file, mode, *rest, **options)
            self.count(f"create {file}")
            raw = plain(file, mode, 0)
            self._paths[raw.fileno()] = str(file)
            return io.BufferedWriter(_File(raw, self))

        io.open = opened

    def count(self, call: str, half: Callable[[], object] = lambda: None) -> None:
        """One call more. `half`: what it has done when it fails."""
        self.calls.append(call)
        if len(self.calls) == self._at:
            half()
            if self._fault == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self._fault, os.strerror(self._fault))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if name == "fsync":
                self.count(f"fsync {self._paths[arguments[0]]}")
            else:
                self.count(f"{name} {' '.join(map(str, arguments[: 2 if name == 'replace' else 1]))}")
            found = real(*arguments, **options)
            if name == "open":
                self._paths[found] = str(arguments[0])
            return found

        return counted


class _File(io.RawIOBase):
    """A file whose writes are counted; the fault leaves the first half on the disk."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._faults.count(f"write {self._file.name}", lambda: self._file.write(view[: len(view) // 2]))
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        return done

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()


Work = Callable[[Path, Callable[[object], None]], None]
"""An operation on the store at a path. It calls its second argument with each thing that is durable now."""


class Outcome:
    """What became of a child."""

    def __init__(self, status: int, output: str) -> None:
        lines = output.splitlines()
        self.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self.finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        self.refused = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2
        self.acknowledged = [line[4:] for line in lines if line.startswith("ack ")]
        self.calls = [line[5:] for line in lines if line.startswith("call ")]
        self.said = "\n".join(line for line in lines if not line.startswith(("ack ", "call ")))

    def __repr__(self) -> str:
        return f"killed={self.killed} refused={self.refused} finished={self.finished}\n{self.said}"


def run(work: Work, root: Path, *, at: int = 0, fault: int = KILL, retry: bool = False) -> Outcome:
    """`work` in a child of its own, the N-th call (from 1; 0: none) failing. With `retry` the child does it
    again after a StoreError, as a program that goes on would."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            code = _child(work, root, writing, Faults(at, fault), retry=retry)
        finally:
            # Nothing of the parent's, pytest least of all, may run on in the child.
            if code == 1:
                os.write(writing, traceback.format_exc().encode())
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="replace") as pipe:
        output = pipe.read()
    _, status = os.waitpid(child, 0)
    return Outcome(status, output)


def _child(work: Work, root: Path, pipe: int, faults: Faults, *, retry: bool) -> int:
    def say(kind: str, what: object) -> None:
        os.write(pipe, f"{kind} {what}\n".encode())

    faults.install()
    try:
        work(root, lambda what: say("ack", what))
    except StoreError as error:
        say("error", error)
        if len(str(error).splitlines()) != 1:
            return 3
        if not retry:
            return 2
        work(root, lambda what: say("ack", what))
    for call in faults.calls:
        say("call", call)
    return 0


def contents(root: Path) -> Contents:
    """Every trace with its tokens; none may come twice."""
    if not (root / MANIFEST).exists():
        return {}
    with TraceStore(root) as store:
        found = store.traces(tokens=True)
    assert len(keyed(found)) == len(found), "a trace stands there twice"
    return keyed(found)


def keyed(traces: Iterable[Trace]) -> Contents:
    """The traces by what tells them apart."""
    return {(each.problem_id, each.teacher, each.sample_index): each for each in traces}


def keys_in(part: Path) -> set[Key]:
    columns = part_rows(part).select(["problem_id", "teacher", "sample_index"]).to_pydict()
    return set(zip(*columns.values(), strict=True))


def append_lacking(writer: StoreWriter, batch: list[Trace]) -> Contents:
    """Appends the traces of one teacher that `done` does not list; returns them."""
    name = batch[0].teacher
    writer.register_teacher(teacher(name))
    done = writer.done(name)
    lacking = [each for each in batch if each.sample_index not in done.get(each.problem_id, {})]
    writer.append(lacking)
    return keyed(lacking)


def assert_in_order(root: Path) -> None:
    """Nothing half-written, nothing that a check would find, nothing that the manifest does not know."""
    assert list(root.rglob(f"{TMP_MARK}*")) == []
    assert check(root).findings == ()
    assert read_manifest(root).parts.keys() == list_parts(root).keys()


# The operations. Each brings any store that an interruption of itself may leave to the same end.

ADA = [[trace(0, "ada"), wrong(1, "ada"), trace(2, "ada", token_ids=(), logprobs=())], [trace(3, "ada")]]
BOB = [trace(0, "bob"), trace(2, "bob", text="é\u0000\U0001f600" * 50), trace(3, "bob")]
EVERYTHING = keyed([*ADA[0], *ADA[1], *BOB])


def write(root: Path, ack: Callable[[object], None]) -> None:
    """What `ampo precompute teachers` does: whatever is not there yet, part by part."""
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.write_problems([problem(number) for number in range(4)])
        for batch in (*ADA, BOB):
            for key in append_lacking(writer, batch):
                ack(key)


def merge(root: Path, _: Callable[[object], None]) -> None:
    """Several parts are made, so that a crash may come between them."""
    compact(root, part_traces=3)


def leave_out(root: Path, _: Callable[[object], None]) -> None:
    try:
        forget(root, "ada")
    except StoreError as error:
        if "no teacher" not in str(error):
            raise


def mend(root: Path, _: Callable[[object], None]) -> None:
    check(root, repair=True)


def nothing(root: Path) -> None:
    """No store yet."""


def three_parts(root: Path) -> None:
    make_store(root, *ADA, BOB)


def compacted_and_one(root: Path) -> None:
    """ada's and bob's traces in one part, and one more of ada's beside it."""
    make_store(root, ADA[0], BOB)
    compact(root)
    make_store(root, ADA[1])


def harmed(root: Path) -> None:
    """One part cut, one gone, one foreign file, and a last part that is whole."""
    make_store(root, [trace(7, "ada")], [trace(8, "ada")], *ADA, BOB)
    first, second = sorted((root / PARTS / "ada").iterdir())[:2]
    first.write_bytes(first.read_bytes()[:-9])
    second.unlink()
    (root / PARTS / "ada" / "part-000077-0123456789abcdef.parquet").write_bytes(b"PAR1")


BEGINNINGS: dict[str, tuple[Callable[[Path], None], Work]] = {
    "write": (nothing, write),
    "compact": (three_parts, merge),
    "compact again": (compacted_and_one, merge),
    "forget": (compacted_and_one, leave_out),
    "repair": (harmed, mend),
}
"""How the store is before, and what is then done to it."""

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO)
