"""Which problems a step trains on."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from run_examples import prompt_of

from store.errors import ProblemsError
from store.records import Problem
from trainer.method.rollouts import problems_of_step, refills_of_step

SIZES = {"problems": st.integers(1, 40), "per_step": st.integers(1, 12), "seed": st.integers(0, 5)}


def epoch(number: int, *, problems: int, per_step: int, seed: int) -> list[int]:
    """What the steps of the 0-based epoch hold, in order."""
    steps = problems // per_step
    first = number * steps + 1
    return [
        item
        for step in range(first, first + steps)
        for item in problems_of_step(range(problems), step=step, per_step=per_step, seed=seed)
    ]


@given(**SIZES, number=st.integers(0, 3))
def test_an_epoch_holds_each_problem_at_most_once_and_drops_less_than_a_step(
    problems: int, per_step: int, seed: int, number: int
) -> None:
    assume(per_step <= problems)
    held = epoch(number, problems=problems, per_step=per_step, seed=seed)
    assert len(held) == problems - problems % per_step
    assert len(set(held)) == len(held)
    assert set(held) <= set(range(problems))


def test_epochs_and_seeds_come_in_different_orders() -> None:
    # Two of 20! orders agree by chance never.
    orders = [
        tuple(epoch(number, problems=20, per_step=5, seed=seed)) for number in range(3) for seed in range(3)
    ]
    assert len(set(orders)) == 9


def test_what_an_epoch_drops_changes_so_every_problem_has_its_turn() -> None:
    # 7 problems, 5 a step: 2 are dropped in each epoch; 20 epochs in a row would drop one by (2/7)^20.
    seen = {item for number in range(20) for item in epoch(number, problems=7, per_step=5, seed=0)}
    assert seen == set(range(7))


@given(per_step=st.integers(1, 50), missing=st.integers(1, 50), step=st.integers(1, 9))
def test_too_few_problems_for_a_step_is_an_error_that_names_both_numbers(
    per_step: int, missing: int, step: int
) -> None:
    few = max(per_step - missing, 0)
    with pytest.raises(ProblemsError, match=rf"problems_per_step = {per_step}, but only {few} problems"):
        problems_of_step(range(few), step=step, per_step=per_step, seed=0)


def test_refills_are_all_problems_that_the_step_does_not_hold_in_an_order_of_its_own() -> None:
    prompts = [prompt_of(Problem(question=f"{n}+1", answer=str(n + 1))) for n in range(40)]
    own = problems_of_step(prompts, step=3, per_step=8, seed=0)
    orders = [list(refills_of_step(prompts, own, step=step, seed=0)) for step in (3, 3, 4)]
    assert {p.problem.problem_id for p in own + orders[0]} == {p.problem.problem_id for p in prompts}
    assert len(orders[0]) == 32
    assert orders[0] == orders[1] != orders[2]
