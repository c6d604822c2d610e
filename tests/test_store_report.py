"""The counts, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from store_examples import JUDGE, make_store, problem, teacher, trace, wrong

from store.reader import TraceStore
from store.reports.report import problem_rows, store_report, trace_row
from store.reports.tables import summary_tables, why_table
from store.writer import StoreWriter


def trace_rows(store: TraceStore, **options: Any) -> list[dict[str, Any]]:
    return [trace_row(each) for each in store.traces(**options)]


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
    assert (eve.traces, eve.verified_share, eve.mean_tokens, eve.verdicts) == (0, 0.0, None, {})
    assert (report.problems, report.traces, report.verified, report.tokens) == (4, 6, 4, 26)
    sizes = [part.stat().st_size for part in root.rglob("part-*.parquet")]
    assert (report.parts, report.bytes, report.damaged) == (2, sum(sizes), ())
    # 0: ada and bob; 1: ada; 2: bob failed; 3: nobody tried.
    assert report.coverage == {0: 2, 1: 1, 2: 1, 3: 0}


def test_tokens_that_nobody_counted_are_unknown_and_no_zeros(tmp_path: Path) -> None:
    ada = [trace(0, "ada", n_tokens=5), trace(1, "ada", n_tokens=0)]
    with TraceStore(make_store(tmp_path / "traces", ada, [trace(0, "bob", n_tokens=0)])) as store:
        report = store_report(store)
    # ada: 5 in the one that was counted.
    assert [(of.mean_tokens, of.uncounted) for of in report.teachers] == [(5.0, 1), (None, 1)]
    console = Console(width=500)
    with console.capture() as capture:
        console.print(summary_tables(report))
    lines = capture.get().splitlines()
    assert [line.split()[-1] for line in lines if line.startswith((" ada ", " bob "))] == ["5.0", "-"]
    (told,) = (line for line in lines if "without a tokenizer" in line)
    assert told.startswith("tokens of ada, bob: unknown")
    assert "import its traces again with --tokenizer" in told
    assert any(" 5 tokens" in line for line in lines)


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
        "filtered": 0,
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


def test_what_a_filter_holds_back_is_verified_but_covers_nothing(tmp_path: Path) -> None:
    held_back = trace(1, "ada", filtered="repetition: 0.9")
    root = make_store(tmp_path / "traces", [trace(0, "ada"), held_back, wrong(2, "ada")], problems=3)
    with TraceStore(root) as store:
        report = store_report(store)
        uncovered = {row["problem_id"]: row for row in problem_rows(store, uncovered=True)}
        filtered, usable = trace_rows(store, filtered=True), trace_rows(store, usable=True)
        assert trace_rows(store, filtered=True, teacher="bob") == []
        assert [row["trace_id"] for row in trace_rows(store, usable=True, limit=1)] == [
            trace(0, "ada").trace_id
        ]
    (ada,) = report.teachers
    assert (ada.traces, ada.verified, ada.filtered, ada.covered) == (3, 2, 1, 1)
    assert (report.filtered, report.coverage) == (1, {0: 2, 1: 1})
    assert uncovered.keys() == {problem(1).problem_id, problem(2).problem_id}
    assert uncovered[problem(1).problem_id]["filtered"] == 1
    assert [(row["trace_id"], row["filtered"]) for row in filtered] == [
        (held_back.trace_id, "repetition: 0.9")
    ]
    assert [row["trace_id"] for row in usable] == [trace(0, "ada").trace_id]
    console = Console(width=80, record=True)
    console.print(summary_tables(report))
    assert "3 traces (2 verified, 1 of them filtered)" in console.export_text()


def test_why_shows_gold_and_answer_as_written_and_as_read(tmp_path: Path) -> None:
    read = {"parsed_answer": "2*x", "parsed_gold": "2", "verdict_detail": "for a reason"}
    mismatch = trace(1, "ada", answer="4/2x", verdict="mismatch", is_correct=False, **read)
    truncated = trace(1, "ada", 1, is_correct=False, finish_reason="length")
    with TraceStore(make_store(tmp_path / "traces", [mismatch, truncated])) as store:
        rows = [{**row, "gold": problem(1).answer} for row in trace_rows(store)]
    console = Console(width=180, record=True)
    console.print(why_table(rows))
    first, second = (line for line in console.export_text().splitlines() if "ada/" in line)
    assert first.split()[1:] == ["ada/0", "mismatch", "2", "2", "4/2x", "2*x", "for", "a", "reason"]
    assert "not correct because the response was truncated" in second
