"""The loss against numbers worked out by hand: one function at a time, then a micro-batch of two rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from store.errors import ConfigError
from trainer.config import GuidanceConfig, TrainConfig
from trainer.method.loss import (
    REDUCTIONS,
    LossInputs,
    StepCounts,
    clip,
    clipped_surrogate,
    group_advantages,
    make_policy_loss,
    shaped_guidance,
)


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.log(torch.tensor(rows))


def test_advantages_are_rewards_less_the_groups_mean() -> None:
    # Mean of (1, 0, 0, 0) is 0.25.
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale="none")
    assert found.tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_scaled_advantages_divide_by_the_sample_standard_deviation() -> None:
    # Squares: 0.5625 + 3 * 0.0625 = 0.75; / (4 - 1) = 0.25; std 0.5. So 0.75 / 0.5 = 1.5, -0.25 / 0.5 = -0.5.
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale="group")
    assert found[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


@pytest.mark.parametrize("scale", ["none", "group"])
def test_a_group_of_equal_rewards_has_no_advantage_at_all(scale: str) -> None:
    # 0.1 is no binary fraction: its mean over 3 may differ from it in the last bit, and must not leak.
    assert group_advantages(torch.tensor([[0.1, 0.1, 0.1]]), scale=scale).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 1.0, 1.1),  # inside the band: rho * A
        (1.5, 1.0, 1.2),  # above, A > 0: clipped at 1 + 0.2
        (0.5, 1.0, 0.5),  # below, A > 0: the minimum keeps the pessimistic rho * A
        (0.5, -1.0, -0.7),  # below, A < 0: clipped at 1 - 0.3, -0.7 < -0.5
        (1.5, -1.0, -1.5),  # above, A < 0: -1.5 < -1.2
    ],
)
def test_the_surrogate_is_the_smaller_of_plain_and_clipped(
    ratio: float, advantage: float, expected: float
) -> None:
    found = clipped_surrogate(
        logs([0.2 * ratio]), logs([0.2]), torch.tensor([[advantage]]), eps_low=0.3, eps_high=0.2
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_shaping_lifts_the_gradient_of_an_unlikely_token() -> None:
    # d f / d log p = p * gamma / (p + gamma)^2. p = 0.1: 0.01 / 0.04 = 0.25. p = 0.9: 0.09 / 1.0 = 0.09.
    for p, expected in [(0.1, 0.25), (0.9, 0.09)]:
        logprobs = logs([p]).requires_grad_()
        shaped_guidance(logprobs, torch.tensor([[1.0]]), gamma=0.1).sum().backward()  # type: ignore[no-untyped-call]
        assert logprobs.grad is not None
        assert logprobs.grad.item() == pytest.approx(expected, rel=1e-5)


def test_shaping_stays_finite_for_an_impossible_token() -> None:
    logprobs = torch.tensor([[-400.0]], requires_grad=True)
    term = shaped_guidance(logprobs, torch.tensor([[1.0]]), gamma=0.1)
    term.sum().backward()  # type: ignore[no-untyped-call]
    assert term.item() == 0.0
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


def test_without_a_teacher_ampo_is_dapos_token_mean() -> None:
    lengths, nobody = torch.tensor([2, 4, 5]), torch.zeros(3, dtype=torch.bool)
    counts = StepCounts(sequences=3, student_sequences=3, student_tokens=11, guided_tokens=0, max_length=10)
    ampo, dapo = (REDUCTIONS[name](lengths, nobody, counts) for name in ("ampo", "dapo"))
    assert ampo.tolist() == pytest.approx(dapo.tolist())


INPUTS = LossInputs(
    logprobs=logs([0.6, 0.2], [0.5, 0.4]),
    entropy=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    old_logprobs=logs([0.4, 0.25], [0.1, 0.5]),  # ratios 1.5, 0.8 and 5.0, 0.8
    response_mask=torch.ones(2, 2, dtype=torch.bool),
    is_teacher=torch.tensor([False, False]),
    advantages=torch.tensor([[1.0], [-1.0]]),
    teacher_logprobs=torch.zeros(2, 2),
)
TRACE_FIRST = replace(INPUTS, is_teacher=torch.tensor([True, False]))
COUNTS = StepCounts(sequences=2, student_sequences=2, student_tokens=4, guided_tokens=0, max_length=10)


def micro(
    inputs: LossInputs = INPUTS, guided: str = "shaped", **options: Any
) -> tuple[torch.Tensor, dict[str, tuple[float, int]]]:
    train = TrainConfig(**({"loss_type": "grpo", "entropy_coef": 0.0} | options))
    loss, sums = make_policy_loss(train, GuidanceConfig(gamma=0.1, loss=guided))(inputs, COUNTS)
    return loss, {name: (float(total), int(tokens)) for name, (total, tokens) in sums.items()}


def loss(inputs: LossInputs = INPUTS, **options: Any) -> float:
    """Under `grpo`: -(1/2) * sum over rows of the mean over a row's two tokens, i.e. -(sum of terms) / 4."""
    return float(micro(inputs, **options)[0])


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        # A = 1:  min(1.5, 1.2) + min(0.8, 0.8) = 2.0.   A = -1: min(-5, -1.2) + min(-0.8, -0.8) = -5.8.
        ({}, 2.0, -5.8),
        # min(1.5, 1.4) + 0.8 = 2.2; for A = -1 only the lower bound matters.
        ({"eps_high": 0.4}, 2.2, -5.8),
        # max(-5, 3 * -1) = -3 instead of -5; a positive advantage is left alone.
        ({"dual_clip": 3.0}, 2.0, -3.8),
        # s = sqrt(1.5 * 0.8) = 1.0954 and sqrt(5 * 0.8) = 2.0 on both tokens of a row.
        ({"importance_sampling_level": "sequence"}, 2 * math.sqrt(1.2), -4.0),
    ],
)
def test_student_terms_by_hand(options: dict[str, Any], good: float, bad: float) -> None:
    assert loss(**options) == pytest.approx(-(good + bad) / 4)


def test_the_sequence_ratio_spreads_over_the_response_alone() -> None:
    # log 2 and log 8 over two tokens: a ratio of 4 on each, and half of its gradient; the prompt stays out.
    new = logs([9.0, 2.0, 8.0]).requires_grad_()
    inputs = replace(
        INPUTS,
        logprobs=new,
        old_logprobs=torch.zeros(1, 3),
        response_mask=torch.tensor([[False, True, True]]),
        advantages=torch.ones(1, 1),
    )
    terms, _ = clip(inputs, TrainConfig(importance_sampling_level="sequence", eps_high=9.0))
    assert terms[0, 1:].tolist() == pytest.approx([4.0, 4.0])
    terms[0, 1:].sum().backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None
    assert new.grad.tolist() == [[0.0, pytest.approx(4.0), pytest.approx(4.0)]]


def test_an_engine_that_computes_otherwise_is_corrected_up_to_a_cap() -> None:
    # pi_old / pi_sampler: 0.4/0.25 = 1.6, 0.25/0.5 = 0.5;  0.1/0.01 = 10 -> 2, 0.5/0.5 = 1.
    # A = 1: 1.6 * 1.2 + 0.5 * 0.8 = 2.32.  A = -1: 2 * -5 + 1 * -0.8 = -10.8.
    known = replace(INPUTS, sampler_logprobs=logs([0.25, 0.5], [0.01, 0.5]))
    found, sums = micro(known)
    assert float(found) == pytest.approx((10.8 - 2.32) / 4)
    # |log 1.6| + |log 0.5| + |log 10| + 0, and one of four tokens is held back by the cap.
    assert sums["sampling/logp_difference"] == (
        pytest.approx(math.log(1.6) + math.log(2) + math.log(10)),
        4,
    )
    assert sums["sampling/is_capped"] == (1.0, 4)
    assert loss(known, is_cap=0.0) == loss()
    assert micro(known, is_cap=0.0)[1]["sampling/is_capped"] == (0.0, 4)


@pytest.mark.parametrize(("options", "student"), [({}, -5.8), ({"dual_clip": 3.0}, -3.8)])
def test_a_trace_is_neither_clipped_nor_corrected(options: dict[str, Any], student: float) -> None:
    # Row 1 a trace: f(0.6) + f(0.2) = 0.6/0.7 + 0.2/0.3; row 2 as before.
    trace = replace(TRACE_FIRST, sampler_logprobs=logs([1.0, 1.0], [0.1, 0.5]))
    assert loss(trace, **options) == pytest.approx(-(0.6 / 0.7 + 0.2 / 0.3 + student) / 4)


def test_equation_7_divides_by_the_teachers_own_probability() -> None:
    # x = pi_theta / pi_teacher: 0.6/0.9 = 2/3 -> (2/3)/(2/3 + 0.1) = 0.869565; 0.2/0.2 = 1 -> 1/1.1.
    trace = replace(TRACE_FIRST, teacher_logprobs=logs([0.9, 0.2], [1.0, 1.0]))
    found = loss(trace, guided="shaped_ratio")
    assert found == pytest.approx((5.8 - (2 / 3 / (2 / 3 + 0.1) + 1 / 1.1)) / 4)


def test_entropy_and_kl_count_student_tokens_alone() -> None:
    # Student row 2 has entropy 3 + 4 over 4 student tokens counted for the step: -0.1 * 7 / 4.
    # KL to a reference of twice the probability: r = 2, 2 - log 2 - 1 a token, two tokens: 0.5 * 2 * . / 4.
    mixed = replace(TRACE_FIRST, reference_logprobs=INPUTS.logprobs + math.log(2))
    plain = loss(mixed)
    assert loss(mixed, entropy_coef=0.1) == pytest.approx(plain - 0.1 * 7 / 4)
    assert loss(mixed, beta=0.5) == pytest.approx(plain + 0.5 * 2 * (1 - math.log(2)) / 4)
    assert micro(mixed)[1]["kl"] == (pytest.approx(2 * (1 - math.log(2))), 2)
    agreed = replace(mixed, reference_logprobs=INPUTS.logprobs)
    assert micro(agreed)[1]["kl"] == (0.0, 2)


def test_clipped_tokens_are_counted_on_the_side_that_holds_them_back() -> None:
    # Ratios 1.5, 0.8 with A = 1: one above. 5.0, 0.7 with A = -1: 0.7 is below 0.8, 5.0 is not held back.
    sums = micro(replace(INPUTS, logprobs=logs([0.6, 0.2], [0.5, 0.35])))[1]
    assert (sums["clip_ratio/low_mean"], sums["clip_ratio/high_mean"]) == ((1.0, 4), (1.0, 4))


def test_what_is_outside_the_response_does_not_reach_the_loss() -> None:
    outside = torch.tensor([[True, False], [True, True]])
    dirty = replace(INPUTS, response_mask=outside, logprobs=logs([0.6, math.nan], [0.5, 0.4]))
    clean = replace(INPUTS, response_mask=outside, logprobs=logs([0.6, 0.9], [0.5, 0.4]))
    assert loss(dirty) == loss(clean)


def test_a_dual_clip_that_would_always_bind_is_refused() -> None:
    with pytest.raises(ValueError, match="above 1"):
        TrainConfig(dual_clip=0.9)


@pytest.mark.parametrize("key", ["objective", "loss_type"])
def test_an_unknown_name_is_refused_with_the_known_ones(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{key} = 'typo': give one of .*, or module:function"):
        make_policy_loss(TrainConfig(**{key: "typo"}), GuidanceConfig())  # type: ignore[arg-type]


def nll(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> Any:
    """A user's guided loss with a denominator of its own, the two guided tokens, and a metric."""
    return inputs.logprobs, 1 / 2, {"guided/nll": -inputs.logprobs}


def test_a_guided_loss_of_the_users_own_with_its_weight_and_metric() -> None:
    # Row 1: (log 0.6 + log 0.2) / 2; row 2 as before, -5.8 / 4. The metric is over the two guided tokens.
    found, sums = micro(TRACE_FIRST, guided="test_trainer_loss:nll")
    assert float(found) == pytest.approx(-(math.log(0.12) / 2 - 5.8 / 4))
    assert sums["guided/nll"] == (pytest.approx(-math.log(0.12)), 2)
