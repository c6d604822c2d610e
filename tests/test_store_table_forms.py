"""Tables in narrow and wide terminals: nothing is cut, and what is left out is told."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from precompute.run.plan import PrecomputeReport, ProblemsSummary, TeacherOutcome
from precompute.run.tables import report_tables
from store.reports.tables import answer_table, plain_table
from store.terminal.table_forms import fitting


def drawn(shown: RenderableType, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    with console.capture() as capture:
        console.print(shown)
    return [line.rstrip() for line in capture.get().splitlines()]


def numbers(names: list[str]) -> RenderableType:
    table = plain_table()
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*("1" for _ in names))
    return fitting(table, names[1:])


@pytest.mark.parametrize(
    ("width", "heads", "told"),
    [
        # Each column has its head and two blanks, but for the edges: 1 + 5 + 2 + 6 + 2 + 7 + 1 = 24.
        (24, ["aaaaa", "bbbbbb", "ccccccc"], None),
        (23, ["aaaaa", "ccccccc"], "bbbbbb"),
        (15, ["aaaaa"], "bbbbbb, ccccccc"),
    ],
)
def test_columns_go_in_the_order_given_and_are_named(width: int, heads: list[str], told: str | None) -> None:
    lines = drawn(numbers(["aaaaa", "bbbbbb", "ccccccc"]), width)
    assert lines[1].split() == heads
    said = " ".join(line.strip() for line in lines[4:]).strip()
    assert said == ("" if told is None else f"a wider terminal also shows: {told}")


@given(st.lists(st.text("abcdef", min_size=1, max_size=12), min_size=1, max_size=8, unique=True), st.data())
def test_no_head_and_no_cell_is_ever_cut_and_each_is_there_or_told(
    names: list[str], data: st.DataObject
) -> None:
    width = data.draw(st.integers(14, 100))  # the longest name, and an edge on both sides
    lines = drawn(numbers(names), width)
    assert all(len(line) <= width and "…" not in line for line in lines)
    shown = lines[1].split()
    gone = " ".join(lines[4:]).replace(",", " ").split()
    assert shown[0] == names[0]
    assert set(shown) | set(gone) >= set(names)


TEACHERS = ("qwen2.5-math-7b", "deepseek-r1-distill-7b", "openthinker2-7b", "am-thinking-v1")


def precomputed() -> RenderableType:
    outcomes = tuple(
        TeacherOutcome(
            name=name,
            model=name,
            engine="transformers",
            new_samples=68_000,
            new_tokens=123_456_789,
            seconds=34_567.8,
            problems=8_500,
            samples=68_000,
            verified=40_000,
            filtered=1_234,
            tokens=223_456_789,
        )
        for name in TEACHERS
    )
    problems = ProblemsSummary(path="p", rows=8_500, duplicates=0, unparseable=(), used=8_500)
    return report_tables(
        PrecomputeReport(problems=problems, store="traces", teachers=outcomes, coverage=(1,))
    )


@pytest.mark.parametrize("width", [80, 100, 300])
@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (precomputed(), (*TEACHERS, "58.8%", "34567.8 s")),
        (answer_table([f"column_{n}" for n in range(20)], [["value"] * 20]), ("column_0", "column_19")),
    ],
    ids=["precompute", "sql"],
)
def test_names_and_figures_are_whole_at_any_width(
    shown: RenderableType, words: tuple[str, ...], width: int
) -> None:
    text = "\n".join(drawn(shown, width))
    assert "…" not in text
    assert [word for word in words if word not in text] == []
