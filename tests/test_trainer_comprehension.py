"""Comprehension scores against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.method.comprehension import (
    bare_answer,
    comprehension_scores,
    mean_probability_scores,
    reading_sequence,
)

# Answers of 2 and 1 tokens; the -9s stand on reasoning and padding and must not count.
LOGPROBS = torch.log(torch.tensor([[0.9, 0.5, 0.125], [0.9, 0.25, 0.9]]))
MASK = torch.tensor([[False, True, True], [False, True, False]])


def test_the_score_is_the_mean_log_probability_of_the_answer() -> None:
    # (ln 1/2 + ln 1/8) / 2 = ln 1/4; ln 1/4: so a tie between the two.
    found = comprehension_scores(LOGPROBS, MASK)
    assert found.tolist() == pytest.approx([math.log(0.25), math.log(0.25)])


def test_a_mask_of_zeros_and_ones_is_a_mask() -> None:
    assert comprehension_scores(LOGPROBS, MASK.long()).equal(comprehension_scores(LOGPROBS, MASK))


def test_mean_prob_averages_probabilities_instead() -> None:
    # (1/2 + 1/8) / 2 = 0.3125; 0.25: no tie here.
    found = mean_probability_scores(LOGPROBS, MASK)
    assert found.exp().tolist() == pytest.approx([0.3125, 0.25])


def test_near_scores_are_not_rounded_together() -> None:
    # bfloat16 has 8 bits of mantissa: it would make these two equal.
    scores = comprehension_scores(torch.tensor([[-1.0001], [-1.0]]), torch.tensor([[True], [True]]))
    assert scores[0] < scores[1]


def test_a_candidate_without_an_answer_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no answer token"):
        comprehension_scores(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))


def test_the_reading_sequence_joins_ids_and_knows_where_the_answer_is() -> None:
    found = reading_sequence(prompt_ids=[1, 2], reasoning_ids=[3], answer_ids=[4, 5])
    assert found.ids == (1, 2, 3, 4, 5)
    assert found.answer_length == 2


def test_an_empty_answer_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="gold answer has no tokens"):
        reading_sequence(prompt_ids=[1], reasoning_ids=[2], answer_ids=[])


@pytest.mark.parametrize(
    ("gold", "bare"),
    [
        ("42", "42"),
        (" $\\frac{7}{4}$ ", "\\frac{7}{4}"),
        ("$1$ or $2$", "$1$ or $2$"),
        ("$", "$"),
        ("\\$5", "\\$5"),
    ],
)
def test_a_gold_formula_loses_its_dollar_signs_inside_a_box(gold: str, bare: str) -> None:
    assert bare_answer(gold) == bare
