"""The index may be missing, stale, broken or unwritable: the answers stay the same."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pytest
from store_examples import (
    JUDGE,
    append_and_leave,
    make_store,
    problem,
    trace,
    wrong,
)

from store.errors import StoreDamagedError, StoreError
from store.format.index import reindex
from store.reader import TraceStore
from store.writer import StoreWriter

spawn = multiprocessing.get_context("spawn")
IDS = [problem(number).problem_id for number in range(4)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three parts: ada 0 1 and a wrong 2, ada 3, bob 0 3."""
    return make_store(
        tmp_path / "it's a store",
        [trace(0, "ada"), trace(1, "ada"), wrong(2, "ada")],
        [trace(3, "ada")],
        [trace(0, "bob"), trace(3, "bob")],
    )


def names(root: Path) -> list[list[str]]:
    """The teachers with a candidate, for each of the four problems."""
    with TraceStore(root) as store:
        found = store.candidates(IDS)
    return [[candidate.teacher for candidate in found[problem_id]] for problem_id in IDS]


ALL = [["ada", "bob"], ["ada"], [], ["ada", "bob"]]


@contextmanager
def as_reader_only(root: Path) -> Iterator[None]:
    """Nothing below `root` can be written within the block, by root neither (who becomes nobody)."""
    modes = {path: path.stat().st_mode for path in (root, *root.rglob("*"))}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(stat.S_IMODE(mode))


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user may enter; pytest's own are closed to others."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def test_the_writer_leaves_a_fresh_index(root: Path) -> None:
    before = (root / "index.duckdb").stat().st_mtime_ns
    assert names(root) == ALL
    assert (root / "index.duckdb").stat().st_mtime_ns == before


def test_without_its_index_a_store_answers_the_same(root: Path) -> None:
    (root / "index.duckdb").unlink()
    assert names(root) == ALL
    assert (root / "index.duckdb").exists()


def test_a_broken_index_is_replaced(root: Path) -> None:
    (root / "index.duckdb").write_bytes(b"not a database")
    assert names(root) == ALL
    (root / "index.duckdb").unlink()
    with duckdb.connect(str(root / "index.duckdb")) as connection:
        connection.execute("CREATE TABLE traces (trace_id VARCHAR)")
    assert names(root) == ALL


def test_an_index_that_breaks_at_any_place_is_replaced_or_named(root: Path) -> None:
    sound = (root / "index.duckdb").read_bytes()
    step = len(sound) // 10
    for start in range(0, len(sound), step):
        cut = bytes(byte ^ 0x55 for byte in sound[start : start + step])
        (root / "index.duckdb").write_bytes(sound[:start] + cut + sound[start + step :])
        complaint = ""
        try:
            assert names(root) == ALL
        except StoreDamagedError as error:
            complaint = str(error)
        if complaint:
            assert complaint.endswith("make it again with `ampo store reindex`")
            reindex(root).close()
            assert names(root) == ALL


def test_an_append_from_another_process_is_seen(root: Path) -> None:
    with TraceStore(root) as store:
        child = spawn.Process(target=append_and_leave, args=(root, [2], "eve"))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert store.candidates(IDS)[IDS[2]] == []
        with TraceStore(root) as fresh:
            assert [t.teacher for t in fresh.candidates(IDS)[IDS[2]]] == ["eve"]
        store.refresh()
        assert [t.teacher for t in store.candidates(IDS)[IDS[2]]] == ["eve"]


def test_a_part_without_an_indexing_after_it_is_seen(root: Path) -> None:
    writer = StoreWriter.open(root, **JUDGE)
    writer.append([trace(2, "ada", 1)])
    assert names(root) == [*ALL[:2], ["ada"], ALL[3]]
    writer.close()


@pytest.mark.parametrize("keep", [0, 0.999])
def test_a_cut_part_is_left_out_and_reported(root: Path, keep: float) -> None:
    (bob,) = (root / "parts" / "bob").iterdir()
    os.truncate(bob, int(keep * bob.stat().st_size))
    assert names(root) == [["ada"], ["ada"], [], ["ada"]]
    with TraceStore(root) as store:
        assert [broken.part for broken in store.damaged] == [f"bob/{bob.name}"]
        assert store.damaged[0].reason


def test_a_part_that_broke_after_indexing_is_named(root: Path) -> None:
    (bob,) = (root / "parts" / "bob").iterdir()
    with TraceStore(root) as store:
        sound = bob.read_bytes()
        middle = sound.index(b"bob says") if b"bob says" in sound else len(sound) // 3
        bob.write_bytes(sound[:4] + bytes(middle) + sound[4 + middle :])
        with pytest.raises(StoreDamagedError, match=f"{bob.name} cannot be read: .*store check --repair"):
            store.candidates(IDS)


def test_a_trace_that_stands_in_two_parts_counts_once(root: Path) -> None:
    (bob,) = (root / "parts" / "bob").iterdir()
    copy = bob.with_name("part-000009-copied.parquet")
    shutil.copy(bob, copy)
    assert names(root) == ALL
    bob.unlink()
    assert names(root) == ALL


def test_reindex_counts_parts_and_traces(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    with reindex(root, progress=lambda done, of: seen.append((done, of))) as index:
        assert index.rows("SELECT count(*) AS traces FROM idx.rows") == [{"traces": 6}]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert names(root) == ALL


def test_a_store_that_cannot_be_written_is_indexed_in_memory(open_place: Path) -> None:
    root = make_store(open_place / "traces", [trace(0, "ada")], [trace(0, "bob")])
    (root / "index.duckdb").unlink()
    with as_reader_only(root):
        assert names(root) == [["ada", "bob"], [], [], []]
        with pytest.raises(StoreError, match=r"cannot write .*Permission denied"):
            reindex(root)
    assert not (root / "index.duckdb").exists()


def test_a_stale_index_that_cannot_be_written_is_passed_over(open_place: Path) -> None:
    root = make_store(open_place / "traces", [trace(0, "ada")])
    writer = StoreWriter.open(root, **JUDGE)
    writer.append([trace(1, "ada")])
    writer.close()
    with as_reader_only(root):
        assert names(root) == [["ada"], ["ada"], [], []]


def test_an_index_that_someone_holds_open_for_writing_hinders_nobody(root: Path) -> None:
    script = (
        "import sys, duckdb\n"
        "held = duckdb.connect(sys.argv[1])\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(root / "index.duckdb")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert names(root) == ALL
        holder.kill()
