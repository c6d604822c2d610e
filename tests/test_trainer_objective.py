"""The objective against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.method.objective import (
    LOSS_TYPES,
    StepCounts,
    clipped_surrogate,
    count,
    group_advantages,
    kl_to_reference,
    log_softmax_and_entropy,
    reduce_terms,
    shaped_guidance,
    token_logprobs,
)


def log(*probabilities: float) -> torch.Tensor:
    return torch.log(torch.tensor([list(probabilities)]))


def test_token_logprobs_puts_each_tokens_log_probability_in_its_own_column() -> None:
    # Two tokens; row 0 predicts token 1. Logits (0, ln 3) are probabilities (1/4, 3/4).
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    found = token_logprobs(logits, torch.tensor([[0, 1]]))
    assert found.tolist() == [[0.0, pytest.approx(math.log(0.75))]]


def test_token_logprobs_refuses_ids_of_another_shape() -> None:
    with pytest.raises(ValueError, match="do not go with"):
        token_logprobs(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.long))


def test_entropy_of_a_fair_coin_is_ln_2_and_masked_tokens_add_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    logprobs, entropy = log_softmax_and_entropy(logits, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(0.5))
    assert entropy.item() == pytest.approx(math.log(2))


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


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale = 'batch'"):
        group_advantages(torch.zeros(1, 2), scale="batch")


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
        log(0.2 * ratio), log(0.2), torch.tensor([[advantage]]), eps_low=0.3, eps_high=0.2
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_shaping_of_a_teacher_token_by_hand() -> None:
    # p = 0.3, gamma = 0.1, A = 0.5: 0.3 / 0.4 * 0.5 = 0.375.
    found = shaped_guidance(log(0.3), torch.tensor([[0.5]]), gamma=0.1)
    assert found.item() == pytest.approx(0.375)


def test_shaping_divides_by_the_teachers_probability_where_it_is_known() -> None:
    # x = 0.3 / 0.6 = 0.5; 0.5 / (0.5 + 0.1) * 0.5 = 0.41666...
    found = shaped_guidance(log(0.3), torch.tensor([[0.5]]), gamma=0.1, teacher_logprobs=log(0.6))
    assert found.item() == pytest.approx(5 / 12)


def test_shaping_lifts_the_gradient_of_an_unlikely_token() -> None:
    # d f / d log p = p * gamma / (p + gamma)^2. p = 0.1: 0.01 / 0.04 = 0.25. p = 0.9: 0.09 / 1.0 = 0.09.
    for p, expected in [(0.1, 0.25), (0.9, 0.09)]:
        logprobs = log(p).requires_grad_()
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


def test_kl_is_zero_where_policies_agree_and_positive_elsewhere() -> None:
    # r = 0.25 / 0.5 = 0.5: 0.5 - ln 0.5 - 1 = 0.19315.
    assert kl_to_reference(log(0.5), log(0.5)).item() == 0.0
    assert kl_to_reference(log(0.5), log(0.25)).item() == pytest.approx(0.5 - math.log(0.5) - 1)


LENGTHS = torch.tensor([2, 4, 5])
TEACHER = torch.tensor([False, False, True])


def test_counts_are_of_the_whole_step() -> None:
    assert count(LENGTHS, TEACHER, max_length=10) == StepCounts(
        sequences=3, student_sequences=2, student_tokens=6, tokens=11, max_length=10
    )


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # N = 3, N_on = 2, T_on = 2 + 4 = 6, T = 11, L_max = 10: no two rules agree on all three sequences.
        # Student: N_on / (N * T_on) = 2 / (3 * 6) = 1/9 whatever its length. Teacher: 1 / (N * 5) = 1/15.
        ("ampo", [1 / 9, 1 / 9, 1 / 15]),
        # 1 / (N * L_max) = 1 / (3 * 10)
        ("dr_grpo", [1 / 30, 1 / 30, 1 / 30]),
        # 1 / T
        ("dapo", [1 / 11, 1 / 11, 1 / 11]),
        # 1 / (N * length)
        ("grpo", [1 / 6, 1 / 12, 1 / 15]),
    ],
)
def test_weights_of_a_sequences_tokens(loss_type: str, expected: list[float]) -> None:
    counts = count(LENGTHS, TEACHER, max_length=10)
    assert LOSS_TYPES[loss_type](LENGTHS, TEACHER, counts).tolist() == pytest.approx(expected)


def test_a_teacher_trace_weighs_the_same_however_long() -> None:
    # Two traces of 2 and 20 tokens, every term 1: each adds 1/N = 1/3 to -L; so does the student: 1/3.
    lengths, teacher = torch.tensor([2, 20, 5]), torch.tensor([True, True, False])
    weights = LOSS_TYPES["ampo"](lengths, teacher, count(lengths, teacher, max_length=30))
    assert (weights * lengths).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_without_a_teacher_ampo_is_dapos_token_mean() -> None:
    nobody = torch.zeros(3, dtype=torch.bool)
    counts = count(LENGTHS, nobody, max_length=10)
    ampo, dapo = (LOSS_TYPES[name](LENGTHS, nobody, counts) for name in ("ampo", "dapo"))
    assert ampo.tolist() == pytest.approx(dapo.tolist())


def test_reduction_reads_only_the_response() -> None:
    # -(0.5 * (1 + 2) + 0.25 * 4) = -2.5; the 100s stand on prompt and padding.
    terms = torch.tensor([[100.0, 1.0, 2.0], [100.0, 4.0, 100.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert reduce_terms(terms, mask, torch.tensor([0.5, 0.25])).item() == pytest.approx(-2.5)


def test_padding_that_is_not_a_number_does_not_reach_the_loss() -> None:
    terms = torch.tensor([[1.0, math.nan]])
    assert reduce_terms(terms, torch.tensor([[True, False]]), torch.tensor([1.0])).item() == -1.0


@given(
    rewards=st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0]), min_size=4, max_size=4), min_size=1, max_size=5
    ),
    scale=st.sampled_from(["none", "group"]),
)
def test_advantages_of_a_group_add_up_to_zero(rewards: list[list[float]], scale: str) -> None:
    found = group_advantages(torch.tensor(rewards), scale=scale)
    assert found.sum(dim=1).abs().max().item() < 1e-5


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    teachers=st.integers(0, 2),
    cut=st.integers(1, 5),
    loss_type=st.sampled_from(sorted(LOSS_TYPES)),
)
def test_the_loss_is_the_same_however_the_step_is_cut_and_padded(
    lengths: list[int], teachers: int, cut: int, loss_type: str
) -> None:
    generator = torch.Generator().manual_seed(len(lengths) * 100 + cut)
    all_lengths = torch.tensor(lengths)
    is_teacher = torch.arange(len(lengths)) < teachers
    counts = count(all_lengths, is_teacher, max_length=12)
    terms = torch.randn(len(lengths), 9, generator=generator, dtype=torch.float64)

    def share(rows: slice, padding: int) -> float:
        padded = torch.nn.functional.pad(terms[rows], (0, padding), value=7.0)
        mask = torch.arange(9 + padding) < all_lengths[rows].unsqueeze(1)
        weights = LOSS_TYPES[loss_type](all_lengths[rows], is_teacher[rows], counts)
        return float(reduce_terms(padded, mask, weights))

    whole = share(slice(None), 0)
    parts = [share(slice(start, start + cut), cut) for start in range(0, len(lengths), cut)]
    assert sum(parts) == pytest.approx(whole, rel=1e-5, abs=1e-6)
