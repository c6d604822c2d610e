"""Groups: failure is a boolean, and the student's own samples decide."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.records import Problem
from trainer.method.groups import TRIGGERS, Group, Sample, guidance_size, outcome_shares, place_guidance

PROBLEM = Problem(question="2+2", answer="4")


def sample(*, correct: bool, reward: float = 0.0, trace_id: str | None = None) -> Sample:
    return Sample(
        token_ids=(5, 1),
        text="x",
        finish_reason="stop",
        is_correct=correct,
        has_format=True,
        reward=reward,
        trace_id=trace_id,
    )


def group(*correct: bool) -> Group:
    return Group(problem=PROBLEM, prompt_ids=(2, 3), samples=tuple(sample(correct=c) for c in correct))


@pytest.mark.parametrize(
    ("correct", "outcome"),
    [((False, False), "all_fail"), ((True, True), "all_solved"), ((True, False), "mixed")],
)
def test_outcome_reads_the_verifiers_boolean(correct: tuple[bool, ...], outcome: str) -> None:
    assert group(*correct).outcome == outcome


def test_a_high_reward_is_no_success() -> None:
    # Format alone may pay; a failed group stays a failed group whatever the weights are.
    failed = Group(
        problem=PROBLEM, prompt_ids=(2,), samples=(sample(correct=False, reward=0.9), sample(correct=False))
    )
    assert failed.outcome == "all_fail"


def test_shares_are_counted_before_replacement() -> None:
    guided = place_guidance(group(False, False), [sample(correct=True, trace_id="t")], Random(0))
    assert outcome_shares([guided, group(True, False)]) == {"all_fail": 0.5, "all_solved": 0.0, "mixed": 0.5}


def test_triggers_name_the_outcomes_that_ask() -> None:
    assert TRIGGERS["all_fail"] == {"all_fail"}
    assert TRIGGERS["never"] == set()
    assert TRIGGERS["always"] == {"all_fail", "mixed", "all_solved"}


@pytest.mark.parametrize(
    ("correct", "candidates", "k", "expected"),
    [
        ((False,) * 8, 4, 2, 2),  # k0
        ((False,) * 8, 1, 2, 1),  # no more than there are
        ((False,) * 3, 9, 5, 2),  # G - 1: a sample of the student's own stays
        ((True, True, True, False), 4, 2, 1),  # `always`: only failed samples give way
        ((True, True), 4, 2, 0),
    ],
)
def test_how_many_traces_enter_a_group(
    correct: tuple[bool, ...], candidates: int, k: int, expected: int
) -> None:
    assert guidance_size(group(*correct), candidates, k) == expected


@given(st.lists(st.booleans(), min_size=2, max_size=8), st.integers(0, 2**31))
def test_traces_only_ever_take_places_of_failed_samples(correct: list[bool], seed: int) -> None:
    before = group(*correct)
    k = guidance_size(before, 2, 2)
    traces = [sample(correct=True, trace_id=f"t{i}") for i in range(k)]
    after = place_guidance(before, traces, Random(seed))
    assert sorted(m.trace_id for m in after.members if m.trace_id) == [t.trace_id for t in traces]
    assert all(not before.samples[place].is_correct for place in after.guidance)
    assert after.samples == before.samples
    assert len(after.members) == len(correct)


def test_the_same_generator_draws_the_same_places() -> None:
    traces = [sample(correct=True, trace_id="t")]
    places = {tuple(place_guidance(group(*[False] * 8), traces, Random(seed)).guidance) for seed in range(40)}
    again = place_guidance(group(*[False] * 8), traces, Random(3)).guidance
    assert again == place_guidance(group(*[False] * 8), traces, Random(3)).guidance
    assert len(places) > 4  # of 8: it is a draw, not always the first


def test_a_group_trains_something_as_soon_as_two_members_earn_differently() -> None:
    failed = group(False, False)  # both earn 0.0
    assert not failed.has_gradient
    trace = sample(correct=True, reward=1.0, trace_id="t")
    assert place_guidance(failed, [trace], Random(0)).has_gradient
