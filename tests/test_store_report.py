"""The counts, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store_examples import JUDGE, make_store, problem, teacher, trace, wrong

from store.report import problem_rows, store_report, trace_rows
from store.trace_store import TraceStore
from store.writer import StoreWriter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four problems. ada: 0 right and wrong, 1 right twice; bob: 0 right, 2 wrong; eve has none.

    Tokens: ada 3 + 3 + 3 + 11 = 20, of which verified 3 + 3 + 11 = 17; bob 3 + 3 = 6, verified 3.
    """
    root = make_store(
        tmp_path / "traces",
        [trace(0, "ada"), wrong(0, "ada", 1), trace(1, "ada"), trace(1, "ada", 1, n_tokens=11)],
        [trace(0, "bob"), wrong(2, "bob")],
    )
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.register_teacher(teacher("eve"))
    return root


def test_the_report_counts_teachers_verdicts_and_tokens(root: Path) -> None:
    with TraceStore(root) as store:
        report = store_report(store)
    ada, bob, eve = report.teachers
    assert (ada.teacher, ada.model, ada.problems, ada.covered) == ("ada", "models/ada", 2, 2)
    assert (ada.traces, ada.verified, ada.verified_share) == (4, 3, 0.75)
    assert (ada.tokens, ada.mean_tokens, ada.verified_tokens) == (20, 5.0, 17)
    assert ada.verdicts == {"match": 3, "mismatch": 1}
    assert (bob.traces, bob.verified, bob.tokens, bob.verified_tokens) == (2, 1, 6, 3)
    assert (bob.problems, bob.covered) == (2, 1)
    assert (eve.traces, eve.verified_share, eve.mean_tokens, eve.verdicts) == (0, 0.0, 0.0, {})
    assert (report.problems, report.traces, report.verified, report.tokens) == (4, 6, 4, 26)


def test_coverage_counts_problems_by_teachers_with_a_verified_trace(root: Path) -> None:
    # 0: ada and bob; 1: ada; 2: bob failed; 3: nobody tried.
    with TraceStore(root) as store:
        assert store_report(store).coverage == {0: 2, 1: 1, 2: 1, 3: 0}


def test_the_report_says_how_much_lies_on_disk(root: Path) -> None:
    sizes = [part.stat().st_size for part in root.rglob("part-*.parquet")]
    with TraceStore(root) as store:
        report = store_report(store)
    assert (report.parts, report.bytes) == (2, sum(sizes))
    assert (report.path, report.manifest.verifier, report.damaged) == (str(root), "math-verify", ())


def test_problem_rows_begin_with_what_nobody_solved(root: Path) -> None:
    with TraceStore(root) as store:
        rows = {row["problem_id"]: row for row in problem_rows(store)}
        uncovered = [row["problem_id"] for row in problem_rows(store, uncovered=True)]
        first = [row["problem_id"] for row in problem_rows(store, limit=1)]
    assert uncovered == sorted([problem(2).problem_id, problem(3).problem_id])
    assert first == uncovered[:1]
    assert rows[problem(1).problem_id] == {
        "problem_id": problem(1).problem_id,
        "question": "What is 1 + 1?",
        "answer": "2",
        "source": "",
        "traces": 2,
        "verified": 2,
        "teachers": ["ada"],
    }
    assert [rows[problem(n).problem_id]["traces"] for n in range(4)] == [3, 2, 1, 0]


def test_trace_rows_are_ready_for_json(root: Path) -> None:
    with TraceStore(root) as store:
        (row,) = trace_rows(store, problem_id=problem(0).problem_id, teacher="bob")
        assert trace_rows(store, verdict="timeout") == []
    assert json.loads(json.dumps(row))["trace_id"] == trace(0, "bob").trace_id
    assert row["created_at"] == "2026-01-02T12:00:00.123456+00:00"
    assert "token_ids" not in row


def test_a_store_without_traces_has_a_report(tmp_path: Path) -> None:
    with TraceStore(make_store(tmp_path / "traces", problems=3)) as store:
        report = store_report(store)
    assert (report.problems, report.traces, report.teachers, report.coverage) == (3, 0, (), {0: 3})
