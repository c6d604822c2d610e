"""The reward rule and the judge, with the real verifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.config import AnswerForm
from precompute.verify.verifier import Verifier
from trainer.method.groups import Sample
from trainer.method.rewards import Judge, reward_of


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1) as opened:
        yield opened


def judged(verifier: Verifier, text: str, *, form: AnswerForm = "boxed", **changes: Any) -> Sample:
    """The sample of a response to a problem whose gold answer is 4; w_f = 0.1."""
    judge = Judge(verifier, answer_form=form, format_weight=0.1)
    fields: dict[str, Any] = {"gold": "4", "token_ids": (7, 8, 1), "finish_reason": "stop", **changes}
    return judge.settle(judge.submit(text=text, **fields))


def outcome(sample: Sample) -> tuple[bool, bool, float]:
    return sample.is_correct, sample.has_format, round(sample.reward, 12)


@pytest.mark.parametrize(
    ("is_correct", "has_format", "weight", "expected"),
    [
        (True, True, 0.1, 1.0),  # 0.9 * 1 + 0.1 * 1
        (True, False, 0.1, 0.9),  # 0.9 * 1 + 0.1 * 0
        (False, True, 0.1, 0.1),  # 0.9 * 0 + 0.1 * 1
        (False, False, 0.1, 0.0),
        (True, False, 0.25, 0.75),
        (True, False, 0.0, 1.0),  # no weight on the form: only the answer counts
        (False, True, 0.0, 0.0),
    ],
)
def test_the_reward_weighs_correctness_and_form(
    is_correct: bool, has_format: bool, weight: float, expected: float
) -> None:
    found = reward_of(is_correct=is_correct, has_format=has_format, format_weight=weight)
    assert found == pytest.approx(expected)


@given(is_correct=st.booleans(), has_format=st.booleans(), weight=st.floats(0, 1, exclude_max=True))
def test_the_reward_lies_between_0_and_1(is_correct: bool, has_format: bool, weight: float) -> None:
    assert 0 <= reward_of(is_correct=is_correct, has_format=has_format, format_weight=weight) <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{4}", (True, True, 1.0)),
        ("so \\boxed{\\frac{8}{2}}", (True, True, 1.0)),  # equal as mathematics, not as text
        ("so \\boxed{5}", (False, True, 0.1)),
        ("so it is 4", (False, False, 0.0)),
        ("so \\boxed{4", (False, False, 0.0)),  # never closed: no answer
    ],
)
def test_a_response_that_ended_by_itself(
    verifier: Verifier, text: str, expected: tuple[bool, bool, float]
) -> None:
    assert outcome(judged(verifier, text)) == expected


def test_a_cut_response_earns_nothing_although_the_right_answer_stands_in_it(verifier: Verifier) -> None:
    sample = judged(verifier, "so \\boxed{4} and", finish_reason="length")
    assert outcome(sample) == (False, False, 0.0)
    assert sample.finish_reason == "length"


def test_of_two_answers_the_last_decides_and_the_form_is_lost(verifier: Verifier) -> None:
    assert outcome(judged(verifier, "\\boxed{3}, no: \\boxed{4}")) == (True, False, 0.9)
    assert outcome(judged(verifier, "\\boxed{4}, no: \\boxed{3}")) == (False, False, 0.0)


def test_the_right_answer_in_another_form_is_correct_without_the_forms_share(verifier: Verifier) -> None:
    tags, box = "so <answer>4</answer>", "so \\boxed{4}"
    assert outcome(judged(verifier, tags, form="boxed")) == (True, False, 0.9)
    assert outcome(judged(verifier, tags, form="answer_tags")) == (True, True, 1.0)
    assert outcome(judged(verifier, box, form="answer_tags")) == (True, False, 0.9)


def test_what_stands_in_a_thought_that_the_prompt_opened_is_no_answer(verifier: Verifier) -> None:
    assert outcome(judged(verifier, "so \\boxed{4}", opens_think=True)) == (False, False, 0.0)
    assert outcome(judged(verifier, "so \\boxed{4}", opens_think=False)) == (True, True, 1.0)
    # The thought's own box neither decides nor costs the form.
    closed = judged(verifier, "\\boxed{3}?</think>so \\boxed{4}", opens_think=True)
    assert outcome(closed) == (True, True, 1.0)


def test_a_sample_keeps_what_it_was_made_of(verifier: Verifier) -> None:
    origin: dict[str, Any] = {"logprobs": (-0.5, -0.25, 0.0), "trace_id": "t1", "teacher": "ada"}
    assert judged(verifier, "so \\boxed{4}", **origin) == Sample(
        token_ids=(7, 8, 1),
        text="so \\boxed{4}",
        finish_reason="stop",
        is_correct=True,
        has_format=True,
        reward=1.0,
        **origin,
    )


def test_verdicts_come_back_to_their_own_samples_in_any_order(verifier: Verifier) -> None:
    judge = Judge(verifier, answer_form="boxed", format_weight=0.1)
    pending = [
        judge.submit(text=f"\\boxed{{{n}}}", gold="4", token_ids=(n,), finish_reason="stop") for n in range(8)
    ]
    settled = {n: judge.settle(pending[n]) for n in reversed(range(8))}
    assert [n for n, sample in settled.items() if sample.is_correct] == [4]
    assert all(sample.token_ids == (n,) for n, sample in settled.items())
