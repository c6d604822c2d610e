"""The loss of a micro-batch by hand: one option at a time, two rows of two tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import GuidanceConfig, TrainConfig
from trainer.method.loss import LossInputs, Partial, micro_loss
from trainer.method.objective import count, dual_clip, sampler_weights, sequence_log_ratio


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.log(torch.tensor(rows))


INPUTS = LossInputs(
    logprobs=logs([0.6, 0.2], [0.5, 0.4]),
    entropy=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    old_logprobs=logs([0.4, 0.25], [0.1, 0.5]),  # ratios 1.5, 0.8 and 5.0, 0.8
    response_mask=torch.ones(2, 2, dtype=torch.bool),
    is_teacher=torch.tensor([False, False]),
    advantages=torch.tensor([[1.0], [-1.0]]),
)
COUNTS = count(torch.tensor([2, 2]), torch.tensor([False, False]), max_length=10)


def loss(inputs: LossInputs = INPUTS, **options: Any) -> float:
    """Under `grpo`: -(1/2) * sum over rows of the mean over a row's two tokens, i.e. -(sum of terms) / 4."""
    return float(micro(inputs, **options)[0])


def micro(inputs: LossInputs = INPUTS, **options: Any) -> tuple[torch.Tensor, Partial]:
    train = TrainConfig(**({"loss_type": "grpo", "entropy_coef": 0.0} | options))
    return micro_loss(inputs, train, GuidanceConfig(gamma=0.1), COUNTS)


def test_clipping_token_by_token() -> None:
    # A = 1:  min(1.5, 1.2) + min(0.8, 0.8) = 2.0.   A = -1: min(-5, -1.2) + min(-0.8, -0.8) = -5.8.
    assert loss() == pytest.approx((5.8 - 2.0) / 4)


def test_clip_higher_lets_a_good_token_rise_further() -> None:
    # eps_high = 0.4: min(1.5, 1.4) + 0.8 = 2.2; for A = -1 only the lower bound matters: -5.8.
    assert loss(eps_high=0.4) == pytest.approx((5.8 - 2.2) / 4)


def test_dual_clip_bounds_what_one_bad_token_weighs() -> None:
    # max(-5, 3 * -1) = -3 in the place of -5: the second row has -3.8.
    assert loss(dual_clip=3.0) == pytest.approx((3.8 - 2.0) / 4)


def test_dual_clip_touches_negative_advantages_alone() -> None:
    terms = torch.tensor([[4.0, 0.5], [-4.0, -0.5]])
    bounded = dual_clip(terms, torch.tensor([[1.0], [-1.0]]), bound=3.0)
    assert bounded.tolist() == [[4.0, 0.5], [-3.0, -0.5]]


def test_a_sequence_is_clipped_as_a_whole() -> None:
    # s = sqrt(1.5 * 0.8) = 1.0954 and sqrt(5 * 0.8) = 2.0 on both tokens of a row. With 0.2 on both sides:
    # A = 1: 2 * min(1.0954, 1.2) = 2.1909.  A = -1: 2 * min(-2, -1.2) = -4.
    assert loss(importance_sampling_level="sequence") == pytest.approx((4.0 - 2 * math.sqrt(1.2)) / 4)


def test_the_sequence_ratio_is_the_geometric_mean_over_the_response_alone() -> None:
    # Row 1: log 2 and log 8 over two tokens: log 4 on each; the prompt's column stays out.
    new = torch.log(torch.tensor([[9.0, 2.0, 8.0]]))
    mask = torch.tensor([[False, True, True]])
    found = sequence_log_ratio(new, torch.zeros(1, 3), mask)
    assert found[0].tolist() == pytest.approx([0.0, math.log(4), math.log(4)])


def test_the_sequence_ratio_gives_every_token_of_a_response_the_same_gradient() -> None:
    # s * A with s = 1: d/d logprob of (1/2) * 2 s = 1/2 on each of two tokens.
    new = torch.zeros(1, 2, requires_grad=True)
    ratio = torch.exp(sequence_log_ratio(new, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)))
    (ratio.sum() / 2).backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None
    assert new.grad.tolist() == [[0.5, 0.5]]


def test_a_sampler_that_computes_otherwise_is_corrected_up_to_a_cap() -> None:
    # pi_old / pi_sampler: 0.4/0.25 = 1.6, 0.25/0.5 = 0.5;  0.1/0.01 = 10 -> 2, 0.5/0.5 = 1.
    # A = 1: 1.6 * 1.2 + 0.5 * 0.8 = 2.32.  A = -1: 2 * -5 + 1 * -0.8 = -10.8.
    known = replace(INPUTS, sampler_logprobs=logs([0.25, 0.5], [0.01, 0.5]))
    found, partial = micro(known)
    assert float(found) == pytest.approx((10.8 - 2.32) / 4)
    # |log 1.6| + |log 0.5| + |log 10| + 0, and one of four tokens is held back by the cap.
    assert partial.sampler_difference == pytest.approx(math.log(1.6) + math.log(2) + math.log(10))
    assert partial.sampler_capped == 1.0
    assert loss(known, is_cap=0.0) == loss()


@given(st.floats(-30, 0), st.floats(-30, 0), st.floats(0.1, 10))
def test_a_correction_is_never_above_its_cap_and_carries_no_gradient(
    old: float, sampler: float, cap: float
) -> None:
    logprob = torch.tensor([[old]], requires_grad=True)
    weight = sampler_weights(logprob, torch.tensor([[sampler]]), cap=cap)
    assert 0 <= weight.item() <= cap * (1 + 1e-6)
    assert not weight.requires_grad


def test_a_trace_is_neither_clipped_nor_corrected() -> None:
    # Row 1 a trace: f(0.6) + f(0.2) = 0.6/0.7 + 0.2/0.3; row 2 as before, -5.8.
    trace = replace(
        INPUTS,
        is_teacher=torch.tensor([True, False]),
        sampler_logprobs=logs([1.0, 1.0], [0.1, 0.5]),
    )
    expected = (5.8 - (0.6 / 0.7 + 0.2 / 0.3)) / 4
    for options in ({}, {"dual_clip": 3.0}):
        bound = 2.0 if options else 0.0  # dual clip takes 2.0 off the second row
        assert loss(trace, **options) == pytest.approx(expected - bound / 4)


def test_equation_7_divides_by_the_teachers_own_probability() -> None:
    # x = pi_theta / pi_teacher: 0.6/0.9 = 2/3 -> (2/3)/(2/3 + 0.1) = 0.869565; 0.2/0.2 = 1 -> 1/1.1.
    trace = replace(
        INPUTS,
        is_teacher=torch.tensor([True, False]),
        teacher_logprobs=logs([0.9, 0.2], [1.0, 1.0]),
    )
    assert loss(trace) == pytest.approx((5.8 - (2 / 3 / (2 / 3 + 0.1) + 1 / 1.1)) / 4)


def test_entropy_and_kl_count_student_tokens_alone() -> None:
    # Student row 2 has entropy 3 + 4 over 4 student tokens counted for the step: -0.1 * 7 / 4.
    # KL to a reference of twice the probability: r = 2, 2 - log 2 - 1 a token, two tokens: 0.5 * 2 * . / 4.
    mixed = replace(
        INPUTS,
        is_teacher=torch.tensor([True, False]),
        reference_logprobs=INPUTS.logprobs + math.log(2),
    )
    plain = loss(mixed)
    assert loss(mixed, entropy_coef=0.1) == pytest.approx(plain - 0.1 * 7 / 4)
    assert loss(mixed, beta=0.5) == pytest.approx(plain + 0.5 * 2 * (1 - math.log(2)) / 4)
    assert micro(mixed)[1].kl == pytest.approx(2 * (1 - math.log(2)))


def test_clipped_tokens_are_counted_on_the_side_that_holds_them_back() -> None:
    # Ratios 1.5, 0.8 with A = 1: one above. 5.0, 0.7 with A = -1: 0.7 is below 0.8, 5.0 is not held back.
    lower = replace(INPUTS, logprobs=logs([0.6, 0.2], [0.5, 0.35]))
    partial = micro(lower)[1]
    assert (partial.clip_low, partial.clip_high) == (1.0, 1.0)


def test_a_dual_clip_that_would_always_bind_is_refused() -> None:
    with pytest.raises(ValueError, match="above 1"):
        TrainConfig(dual_clip=0.9)
