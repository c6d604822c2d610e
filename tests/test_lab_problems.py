"""lab.problems and lab.solutions: answers, disjoint seeded sets, and that every style says the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.problems import Chain, draw_chain, draw_sets, draw_unseen, write_jsonl
from lab.recipes import LAB, RECIPES
from lab.solutions import SLIPS, STYLES, slipping

# 12+3 = 15, 15-4 = 11, 11+5 = 16; the sums apart: 12+3 = 15, +5 = 20, taken away 4, 20-4 = 16.
WORKED = Chain(start=12, terms=(3, -4, 5))
SHIPPED = Path(__file__).parent.parent / "lab"

seeds = st.integers(0, 2**32)
lengths = st.integers(1, 8)


def test_a_chain_is_worked_from_the_left() -> None:
    assert WORKED.question == "12+3-4+5"
    assert WORKED.totals == (12, 15, 11, 16)
    assert WORKED.answer == 16
    assert WORKED.cut(2) == Chain(start=12, terms=(3, -4))


@pytest.mark.parametrize(
    ("style", "solution"),
    [
        ("totals", r"12+3=15;15-4=11;11+5=16;\boxed{16}"),
        ("words", r"First 12+3=15, then 15-4=11, then 11+5=16. So \boxed{16}"),
        ("signs", r"+:12+3=15;15+5=20;-:4;20-4=16;\boxed{16}"),
        ("terse", r"\boxed{16}"),
        # The totals 15, 11 and 16 from right to left.
        ("mirror", r"+3:51,-4:11,+5:61 \boxed{16}"),
        ("padded", r"12+3=15;3+3=6;15-4=11;4+4=8;11+5=16;5+5=10;\boxed{16}"),
        ("lucky", r"12+12=24;\boxed{16}"),
    ],
)
def test_each_style_solves_the_worked_example(style: str, solution: str) -> None:
    assert STYLES[style](WORKED) == solution


def test_extremes_keep_the_larger_or_the_smaller_number() -> None:
    # max(34, 27) = 34, min(34, 81) = 34, max(34, 45) = 45.
    chain = Chain(start=34, terms=(27, -81, 45), family="extremes")
    assert (chain.question, chain.totals, chain.answer) == ("34^27v81^45", (34, 34, 34, 45), 45)
    assert STYLES["totals"](chain) == r"34^27=34;34v81=34;34^45=45;\boxed{45}"
    assert STYLES["terse"](chain) == r"\boxed{45}"


def test_signs_leaves_out_what_there_is_nothing_of() -> None:
    assert STYLES["signs"](Chain(start=12, terms=(3,))) == r"+:12+3=15;\boxed{15}"
    # 3+4 = 7 is taken from 20.
    assert STYLES["signs"](Chain(start=20, terms=(-3, -4))) == r"+:20;-:3+4=7;20-7=13;\boxed{13}"


def test_a_slip_is_carried_to_the_answer() -> None:
    # One off at every sum: 12+3 = 16, 16-4 = 13, 13+5 = 19.
    assert STYLES["totals"](WORKED, lambda a, b: a + b + 1) == r"12+3=16;16-4=13;13+5=19;\boxed{19}"


def test_slips_come_as_often_as_asked_for() -> None:
    rng = Random(0)
    sums = [slipping(rng, 0.25)(40, 2) for _ in range(4000)]
    wrong = [total - 42 for total in sums if total != 42]
    assert set(wrong) == set(SLIPS)
    # 4000 draws at 0.25: 1000 expected, standard deviation 27.
    assert 900 < len(wrong) < 1100
    assert all(slipping(rng, 0.0)(40, 2) == 42 for _ in range(100))


@given(seed=seeds, n=lengths)
def test_a_chain_is_worked_right_in_every_style(seed: int, n: int) -> None:
    chain = draw_chain(Random(seed), n)
    assert eval(chain.question) == chain.answer
    assert len(chain.terms) == n
    assert len(chain.question) == 2 + 2 * n
    assert all(10 <= total <= 99 for total in chain.totals)
    for style, write in STYLES.items():
        solution = write(chain)
        assert solution.endswith(f"\\boxed{{{chain.answer}}}")
        assert solution.count("\\boxed") == 1
        assert len(solution) <= 160
        equations = re.findall(r"(\d+[+-]\d+)=(\d+)", solution)
        assert len(equations) == {"terse": 0, "mirror": 0, "lucky": 1, "padded": 2 * n}.get(style, n)
        assert all(eval(left) == int(right) for left, right in equations)


def test_sets_are_disjoint_and_hold_what_the_recipe_says() -> None:
    sets = draw_sets(LAB.sets, seed=0)
    questions = [chain.question for chains in sets.values() for chain in chains]
    assert len(questions) == len(set(questions))
    assert {name: len(chains) for name, chains in sets.items()} == {
        "train": 256,
        "heldout": 128,
        "harder": 64,
    }


def test_a_seen_question_is_drawn_no_more() -> None:
    # Without the set, the same seed draws the same chain.
    first = draw_chain(Random(5), 2)
    assert draw_unseen(Random(5), 2, {first.question}) != first


def test_a_row_is_question_answer_and_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sub" / "p.jsonl", [WORKED])
    rows = [json.loads(line) for line in (tmp_path / "sub" / "p.jsonl").read_text().splitlines()]
    assert rows == [{"question": "12+3-4+5", "answer": "16", "source": "lab-n3"}]


@pytest.mark.parametrize(("recipe", "folder"), [("lab", "problems"), ("peers", "peers/problems")])
def test_shipped_problem_files_are_what_the_recipe_makes(recipe: str, folder: str, tmp_path: Path) -> None:
    for name, chains in draw_sets(RECIPES[recipe].sets, seed=0).items():
        write_jsonl(tmp_path / f"{name}.jsonl", chains)
        assert (SHIPPED / folder / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()


def test_harder_chains_are_longer_than_any_that_was_learned() -> None:
    learned = {n for model in LAB.models for habit in model.mixture for n in habit.operations}
    harder = next(plan for plan in LAB.sets if plan.name == "harder")
    assert min(harder.counts) > max(learned)
