"""Readers, writers and a compaction at once, in processes of their own: no error, no half part, no loss."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from store_examples import JUDGE, make_store, problem, teacher, trace
from store_faults import contents, keyed

from store.errors import StoreBusyError
from store.format import index, parts
from store.format.parts import PartStamp, check_digest, list_parts
from store.reader import TraceStore
from store.upkeep.checking import check
from store.upkeep.compaction import compact
from store.writer import StoreWriter

fork = multiprocessing.get_context("fork")

PART = 5
"""Traces of each part: what a reader sees is a multiple of it."""

TRACES = 50
IDS = [problem(number).problem_id for number in range(TRACES)]


@contextmanager
def started(*works: tuple[Callable[..., None], tuple[object, ...]]) -> Iterator[list[BaseProcess]]:
    """Child processes; at the end of the block all must have ended well."""
    children = [fork.Process(target=work, args=arguments) for work, arguments in works]
    for child in children:
        child.start()
    try:
        yield children
        for child in children:
            child.join(120)
            assert child.exitcode == 0, child
    finally:
        for child in children:
            child.kill()


def append_all(root: Path, name: str, first: int, shard: str | None = None) -> None:
    """Part after part, each by a writer of its own, between the compactions."""
    for start in range(first, TRACES, 2 * PART):
        with open_in_turn(root, shard) as writer:
            writer.register_teacher(teacher(name))
            writer.append([trace(number, name) for number in range(start, start + PART)])


def open_in_turn(root: Path, shard: str | None) -> StoreWriter:
    while True:
        with suppress(StoreBusyError):
            return StoreWriter.open(root, shard=shard, **JUDGE)
        time.sleep(0.005)


def compact_until_all(root: Path) -> None:
    """Again and again, whenever nobody writes."""
    while len(contents(root)) < TRACES:
        with suppress(StoreBusyError):
            compact(root, part_traces=20)


def look(store: TraceStore, seen: int) -> int:
    """The traces there now, as the reader sees them: exact, whole parts, none gone that was there."""
    found = [each for ones in store.candidates(IDS, tokens=True).values() for each in ones]
    assert store.damaged == ()
    assert all(each == trace(IDS.index(each.problem_id), each.teacher) for each in found)
    assert len(found) % PART == 0, f"{len(found)} traces: a part was seen in pieces"
    assert len(found) >= seen, f"{len(found)} traces after {seen} had been seen"
    return len(found)


def refresh_until_all(root: Path) -> None:
    """A reader that stays open."""
    seen = 0
    with TraceStore(root) as store:
        while seen < TRACES:
            seen = look(store, seen)
            store.refresh()


def open_until_all(root: Path) -> None:
    """A reader that comes anew each time."""
    seen = 0
    while seen < TRACES:
        with TraceStore(root) as store:
            seen = look(store, seen)


def test_readers_while_one_writes_and_another_compacts(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces")
    with started(
        (append_all, (root, "ada", 0)),
        (append_all, (root, "bob", PART)),
        (compact_until_all, (root,)),
        (refresh_until_all, (root,)),
        (refresh_until_all, (root,)),
        (open_until_all, (root,)),
    ):
        pass
    assert len(contents(root)) == TRACES
    assert check(root).findings == ()


def test_two_shards_write_side_by_side(tmp_path: Path) -> None:
    root = make_store(tmp_path / "traces")
    with started(
        (append_all, (root, "ada", 0, "1-of-2")),
        (append_all, (root, "bob", PART, "2-of-2")),
        (refresh_until_all, (root,)),
        (open_until_all, (root,)),
    ):
        pass
    # 50 numbers in turn, five each: ada 0-4, 10-14, ...; bob 5-9, 15-19, ...
    expected = keyed(trace(n, "ada" if n // PART % 2 == 0 else "bob") for n in range(TRACES))
    assert contents(root) == expected
    assert check(root).findings == ()


def hold(root: Path, shard: str | None, held: Path, until: Path) -> None:
    """A writer that sits on its lock."""
    with StoreWriter.open(root, shard=shard, **JUDGE):
        held.touch()
        while not until.exists():
            time.sleep(0.005)


@pytest.mark.parametrize(("first", "second"), [("1-of-2", None), (None, "1-of-2"), ("1-of-2", "1-of-2")])
def test_who_is_refused_learns_who_writes(tmp_path: Path, first: str | None, second: str | None) -> None:
    root, held, until = make_store(tmp_path / "traces"), tmp_path / "held", tmp_path / "until"
    with started((hold, (root, first, held, until))) as (holder,):
        wait_for(held)
        with pytest.raises(StoreBusyError, match=f"is being written by process {holder.pid};"):
            StoreWriter.open(root, shard=second, **JUDGE)
        until.touch()
    StoreWriter.open(root, shard=second, **JUDGE).close()


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_listing_that_a_compaction_tore_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = PartStamp(1, 1)
    # The second reads all/ before the new part came and ada/ after the old one went.
    listings = iter([{"ada/part-1": stamp}, {}, {"all/part-1": stamp}])
    monkeypatch.setattr(parts, "_listed", lambda root: next(listings))
    assert list_parts(Path("any")) == {"all/part-1": stamp}


@pytest.mark.parametrize("writable", [True, False])
def test_a_compaction_between_listing_and_reading_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    root = make_store(tmp_path / "traces", [trace(0, "ada")], [trace(1, "ada")], [trace(1, "bob")])
    compacted = Path(shutil.copytree(root, tmp_path / "compacted"))
    compact(compacted)
    (root / "index.duckdb").unlink()
    if not writable:
        (root / ".index.lock").unlink(missing_ok=True)
        (root / ".index.lock").mkdir()  # nobody can lock it: the index is made in memory
    calls: list[Path] = []

    def checked(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            shutil.copytree(compacted / "parts" / "all", root / "parts" / "all")
            for old in ("ada", "bob"):
                shutil.rmtree(root / "parts" / old)
        check_digest(path)

    monkeypatch.setattr(index, "check_digest", checked)
    assert contents(root) == keyed([trace(0, "ada"), trace(1, "ada"), trace(1, "bob")])
    assert len(calls) == 3  # two of the old parts, then the new one
    assert os.path.exists(root / "index.duckdb") == writable
