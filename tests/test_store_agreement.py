"""Agreement between teachers, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from store_examples import make_store, trace

from store.reader import TraceStore
from store.records import Trace
from store.reports.agreement import agreement_table, agreements


def wrong(number: int, name: str, answer: str | None, sample_index: int = 0) -> Trace:
    verdict = "no_answer" if answer is None else "mismatch"
    text = f"it is {answer}"
    return trace(number, name, sample_index, verdict=verdict, is_correct=False, text=text, answer=answer)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Problems 0 to 4.

    problem   ada              bob            eve
    0         right            right          -
    1         right, 7 wrong   7 wrong        -
    2         9 wrong          right, 8 wrong -
    3         no answer        5 wrong        -
    4         -                5 wrong        right
    """
    return make_store(
        tmp_path / "traces",
        [
            trace(0, "ada"), trace(1, "ada"), wrong(1, "ada", "7", 1), wrong(2, "ada", "9"),
            wrong(3, "ada", None),
        ],
        [
            trace(0, "bob"), wrong(1, "bob", " 7 "), trace(2, "bob"), wrong(2, "bob", "8", 1),
            wrong(3, "bob", "5"), wrong(4, "bob", "5"),
        ],
        [trace(4, "eve")],
        problems=5,
    )  # fmt: skip


def test_pairs_are_counted_over_the_problems_that_both_tried(root: Path) -> None:
    with TraceStore(root) as store:
        ada_bob, bob_eve = agreements(store)
    assert ada_bob == {
        # Both: 0. Only ada: 1. Only bob: 2. Neither: 3.
        "one": "ada", "other": "bob", "tried": 4, "both": 1, "only_one": 1, "only_other": 1, "neither": 1,
        # (0 and 3) of 4; 0 among 0, 1, 2. Both gave a wrong answer to 1 and 2, the same one to 1.
        "agreement": 0.5, "jaccard": 1 / 3, "both_wrong": 2, "same_wrong": 1, "same_wrong_share": 0.5,
    }  # fmt: skip
    assert (bob_eve["one"], bob_eve["other"], bob_eve["tried"], bob_eve["only_other"]) == ("bob", "eve", 1, 1)
    assert (bob_eve["agreement"], bob_eve["jaccard"], bob_eve["same_wrong_share"]) == (0.0, 0.0, None)
    console = Console(width=80, record=True)
    console.print(agreement_table([ada_bob, bob_eve]))
    assert "50.0%    33.3%  50.0%" in console.export_text()


def test_teachers_without_a_common_problem_are_no_pair(tmp_path: Path) -> None:
    with TraceStore(make_store(tmp_path / "traces", [trace(0, "ada")], [trace(1, "bob")])) as store:
        assert agreements(store) == []
    assert "no two teachers" in str(agreement_table([]))
