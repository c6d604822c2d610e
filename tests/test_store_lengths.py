"""Lengths: quantiles by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from store_examples import make_store, trace, wrong

from store.errors import StoreError, UserError
from store.reader import TraceStore
from store.reports.lengths import length_rows, lengths_table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ada: 5 verified traces of 10, 20, 30, 40, 50 tokens and a wrong one of 3; bob: one of 3."""
    ada = [trace(0, "ada", n, n_tokens=10 * (n + 1)) for n in range(5)]
    return make_store(tmp_path / "traces", [*ada, wrong(1, "ada")], [trace(0, "bob")])


def test_quantiles_are_those_of_the_sorted_lengths(root: Path) -> None:
    with TraceStore(root) as store:
        rows = length_rows(store, "tokens")
    assert [(row["teacher"], row["traces"], row["count"]) for row in rows] == [
        ("ada", "verified", 5), ("ada", "other", 1), ("bob", "verified", 1),
    ]  # fmt: skip
    # Places 0.2, 1, 2, 3 and 3.8 among 10, 20, 30, 40, 50.
    numbers = {name: rows[0][name] for name in ("min", "p5", "p25", "p50", "p75", "p95", "max", "mean")}
    assert numbers == pytest.approx(
        {"min": 10, "p5": 12, "p25": 20, "p50": 30, "p75": 40, "p95": 48, "max": 50, "mean": 30}
    )


def test_characters_are_those_of_the_texts(root: Path) -> None:
    with TraceStore(root) as store:
        found = length_rows(store, "chars")
        with pytest.raises(UserError, match="--unit words: one of tokens, chars"):
            length_rows(store, "words")
    # "ada says: it is \\boxed{0}" and "no idea"
    assert [(row["teacher"], row["traces"], row["min"], row["max"]) for row in found] == [
        ("ada", "verified", 25, 25), ("ada", "other", 7, 7), ("bob", "verified", 25, 25),
    ]  # fmt: skip


def test_tokens_that_nobody_counted_are_no_lengths(tmp_path: Path) -> None:
    uncounted = trace(0, "ada", n_tokens=0, token_ids=(), logprobs=())
    with TraceStore(make_store(tmp_path / "traces", [uncounted])) as store:
        with pytest.raises(StoreError, match="no trace with a length in tokens; try --unit chars"):
            length_rows(store, "tokens")
        assert [row["teacher"] for row in length_rows(store, "chars")] == ["ada"]


def test_the_table_fits_a_terminal(root: Path) -> None:
    with TraceStore(root) as store:
        found = length_rows(store, "tokens")
    console = Console(width=80, record=True)
    console.print(lengths_table(found, "tokens"))
    assert "…" not in console.export_text()
