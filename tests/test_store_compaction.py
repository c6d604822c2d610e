"""Merging parts, and leaving a teacher out."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest
from store_examples import JUDGE, make_store, problem, teacher, trace, wrong

from store.errors import StoreBusyError, StoreError
from store.format.index import open_index
from store.format.manifest import read_manifest
from store.reader import TraceStore
from store.upkeep.checking import check
from store.upkeep.compaction import compact, forget
from store.writer import StoreWriter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten problems; ada solved all in five parts of two, bob two of them and one not."""
    parts = [[trace(number, "ada"), trace(number + 5, "ada")] for number in range(5)]
    parts.append([trace(0, "bob"), trace(7, "bob", token_ids=(), logprobs=()), wrong(3, "bob")])
    return make_store(tmp_path / "traces", *parts, problems=10)


def everything(root: Path) -> list[object]:
    with TraceStore(root) as store:
        return [*store.traces(tokens=True)]


def test_compaction_changes_no_trace_and_leaves_one_part(root: Path) -> None:
    before = everything(root)
    report = compact(root)
    assert (report.traces, report.parts) == (13, (6, 1))
    assert everything(root) == before
    (part,) = root.rglob("part-*.parquet")
    assert part.parent.name == "all"
    ids = pq.read_table(part)["problem_id"].to_pylist()
    assert ids == sorted(ids)
    assert check(root).findings == ()


def test_a_compact_store_is_left_alone(root: Path) -> None:
    compact(root)
    (part,) = root.rglob("part-*.parquet")
    stamp = part.stat().st_mtime_ns
    assert compact(root).traces == 0
    assert part.stat().st_mtime_ns == stamp


def test_parts_are_cut_between_problems(root: Path) -> None:
    compact(root, part_traces=3)
    with open_index(root) as index:
        rows = index.rows("SELECT part, count(*) AS n FROM idx.rows GROUP BY part ORDER BY part")
        split = index.rows("SELECT problem FROM idx.rows GROUP BY problem HAVING count(DISTINCT part) > 1")
    assert split == []
    assert sum(row["n"] for row in rows) == 13
    # Parts of about three traces, where a problem with two teachers may reach over: 3 + 1 at most.
    assert all(row["n"] <= 4 for row in rows)


def test_what_came_after_a_compaction_is_merged_by_the_next(root: Path) -> None:
    compact(root)
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.append([trace(3, "bob", 1)])
    before = everything(root)
    report = compact(root)
    assert report.parts == (2, 1)
    assert everything(root) == before


def test_a_reader_that_knows_the_old_parts_goes_on(root: Path) -> None:
    ids = [problem(number).problem_id for number in range(10)]
    with TraceStore(root) as store:
        before = store.candidates(ids[:2])
        compact(root)
        assert store.candidates(ids[:2]) == before
        assert sum(map(len, store.candidates(ids).values())) == 12


def test_a_writer_keeps_compaction_out(root: Path) -> None:
    with StoreWriter.open(root, **JUDGE), pytest.raises(StoreBusyError, match="is being written by"):
        compact(root)


def test_a_damaged_part_stays_and_the_others_are_merged(root: Path) -> None:
    victim = sorted((root / "parts" / "ada").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:100])
    report = compact(root)
    assert (report.traces, report.parts[1]) == (11, 2)
    assert victim.exists()
    (finding,) = check(root).findings
    assert (finding.fault, dict(finding.traces)) == ("truncated", {"ada": 2})


@pytest.mark.parametrize("compacted", [False, True])
def test_a_forgotten_teacher_is_gone_and_nobody_else(root: Path, compacted: bool) -> None:
    if compacted:
        compact(root)
    forget(root, "ada")
    with TraceStore(root) as store:
        assert {found.teacher for found in store.traces()} == {"bob"}
        assert len(store.traces()) == 3
        assert list(store.teachers()) == ["bob"]
    assert sum(sum(entry.traces.values()) for entry in read_manifest(root).parts.values()) == 3
    with StoreWriter.open(root, **JUDGE) as writer:
        # Nothing of the old recipe is left to forbid another.
        writer.register_teacher(teacher("ada", revision="v2"))


def test_an_unknown_teacher_cannot_be_forgotten(root: Path) -> None:
    with pytest.raises(StoreError, match=r"no teacher 'eve' in .*; its teachers: ada, bob"):
        forget(root, "eve")


def test_anybody_opens_the_parts_as_plain_parquet(root: Path) -> None:
    compact(root)
    duckdb_rows = duckdb.sql(
        f"SELECT teacher, text, len(token_ids) FROM '{root}/parts/**/*.parquet' WHERE is_correct ORDER BY ALL"
    ).fetchall()
    assert len(duckdb_rows) == 12
    assert duckdb_rows[0] == ("ada", "ada says: it is \\boxed{0}", 3)
    (part,) = root.rglob("part-*.parquet")
    frame = pd.read_parquet(part)
    assert sorted(frame["text"][frame["is_correct"]]) == sorted(row[1] for row in duckdb_rows)
