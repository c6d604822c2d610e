"""An optimizer step: what enters it, and that it does not depend on how it is cut."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from run_examples import prompt_of, sample_of, updater_of
from transformers import masking_utils

from store.records import Problem
from trainer.config import GuidanceConfig, StudentConfig, TrainConfig
from trainer.method.groups import Group
from trainer.method.loss import GUIDED_LOSSES, REDUCTIONS
from trainer.method.update import (
    IDLE,
    NonFiniteError,
    Updater,
    count,
    mean_metrics,
    member_advantages,
    sequences_of,
)
from trainer.student.batches import TrainSequence, train_batch
from trainer.student.load import load_policy
from trainer.student.optimizer import make_optimizer
from trainer.student.policy import Policy

PROBLEM = Problem(question="2+2", answer="4")


def updater(train: TrainConfig, *, reference: Any = None, **guidance: Any) -> Updater:
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
    return updater_of(policy, train, GuidanceConfig(**guidance), reference=reference)


def sequences(seed: int, *, teacher_logprobs: bool = False) -> list[TrainSequence]:
    """Six sequences of 1 to 12 tokens, two of them traces."""
    rng = Random(seed)
    found = []
    for index in range(6):
        length = rng.randint(1, 12)
        ids = tuple(rng.randrange(5, 90) for _ in range(length))
        known = tuple(-rng.random() for _ in ids) if teacher_logprobs and index < 2 else None
        found.append(
            TrainSequence(
                prompt_ids=(2, *(rng.randrange(5, 90) for _ in range(rng.randint(0, 6))), 3),
                response_ids=ids,
                advantage=rng.uniform(-1, 1),
                is_teacher=index < 2,
                teacher_logprobs=known,
            )
        )
    return found


def keep_gradient(made: Updater) -> list[torch.Tensor]:
    """Filled by the next optimizer step, which frees the gradients themselves."""
    kept: list[torch.Tensor] = []
    parameters = list(made.policy.model.parameters())
    made.optimizer.register_step_pre_hook(
        lambda *_: kept.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    )
    return kept


@given(
    seed=st.integers(0, 1000),
    budget=st.integers(1, 150),
    loss_type=st.sampled_from(sorted(REDUCTIONS)),
    guided=st.sampled_from(["shaped", "shaped_ratio"]),
)
@settings(max_examples=16, deadline=None)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch_budget(
    seed: int, budget: int, loss_type: str, guided: str
) -> None:
    rows = [
        replace(row, old_logprobs=(-2.0,) * len(row.response_ids))
        for row in sequences(seed, teacher_logprobs=guided == "shaped_ratio")
    ]
    reports, gradients = [], []
    for tokens in (10_000, budget):
        made = updater(TrainConfig(loss_type=loss_type, max_tokens_per_microbatch=tokens), loss=guided)
        kept = keep_gradient(made)
        reports.append(made.optimizer_step(rows))
        gradients += kept
    assert reports[1].keys() == reports[0].keys()
    for name in ("loss", "grad_norm", "entropy", "clip_ratio/low_mean", "train_tokens"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-5, abs=1e-7)
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference.item() < 1e-5


def test_the_loss_of_a_step_by_hand() -> None:
    # On the first optimizer step rho = 1, so a student token's term is A: 2 tokens of 0.5, 4 of -0.1. With
    # gamma = 1e-9, f(pi) = 1, so the trace's 5 tokens have the term A = 0.3. No entropy bonus. N = 3,
    # N_on = 2, T_on = 6, T = 11, L_max = 32; the sum of all terms is 1.0 - 0.4 + 1.5 = 2.1.
    # ampo:    -(1/3) * (0.3 + 2/6 * (1.0 - 0.4)) = -0.5 / 3
    # dapo:    -2.1 / 11      dr_grpo: -2.1 / (3 * 32)      grpo: -(0.5 - 0.1 + 0.3) / 3 = -0.7 / 3
    rows = [
        TrainSequence(prompt_ids=(2,), response_ids=(9, 1), advantage=0.5, is_teacher=False),
        TrainSequence(prompt_ids=(2,), response_ids=(9, 8, 7, 1), advantage=-0.1, is_teacher=False),
        TrainSequence(prompt_ids=(2,), response_ids=(9, 8, 7, 6, 1), advantage=0.3, is_teacher=True),
    ]
    expected_losses = {"ampo": -0.5 / 3, "dapo": -2.1 / 11, "dr_grpo": -2.1 / 96, "grpo": -0.7 / 3}
    for loss_type, expected in expected_losses.items():
        train = TrainConfig(loss_type=loss_type, entropy_coef=0.0)
        made = updater(train, gamma=1e-9)
        assert made.optimizer_step(rows)["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_long_trace_beside_another_long_one_weighs_as_much_as_beside_a_short_one() -> None:
    # The published code divides by the micro-batch's tokens, so a trace packed beside a long one weighs less.
    # Here each of N = 2 traces adds f * A / 2, f = 1: with A = 1 and A = 0 the loss is -0.5 in both cases.
    first = TrainSequence(prompt_ids=(2,), response_ids=(9,) * 20, advantage=1.0, is_teacher=True)
    for other_length in (1, 20):
        other = TrainSequence(
            prompt_ids=(2,), response_ids=(9,) * other_length, advantage=0.0, is_teacher=True
        )
        made = updater(TrainConfig(entropy_coef=0.0), gamma=1e-12)
        assert made.optimizer_step([first, other])["loss"] == pytest.approx(-0.5, rel=1e-3)


def group(*rewards: float) -> Group:
    return Group(prompt=prompt_of(PROBLEM), samples=tuple(map(sample_of, rewards)))


def test_a_group_of_equal_rewards_is_left_out_of_every_count() -> None:
    groups = [group(0.1, 0.1), group(1.0, 0.1), group(1.0, 1.0)]
    rows = sequences_of(groups, member_advantages(groups, scale="none"))
    assert [round(row.advantage, 4) for row in rows] == [0.45, -0.45]


def test_a_step_without_a_difference_updates_nothing() -> None:
    made = updater(TrainConfig(problems_per_step=2, mini_batch_problems=1))
    before = [parameter.clone() for parameter in made.policy.model.parameters()]
    groups = [group(0.1, 0.1), group(1.0, 1.0)]
    report = made.update(groups, member_advantages(groups, scale="none"))
    assert report["optimizer_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, made.policy.model.parameters(), strict=True))


def test_guidance_makes_a_dead_group_alive() -> None:
    # Rewards (0.1, 1.0): mean 0.55, so the trace gets +0.45 and the failed sample -0.45.
    guided = replace(group(0.1, 0.1), guidance={1: sample_of(1.0, trace_id="t")})
    rows = sequences_of([guided], member_advantages([guided], scale="none"))
    assert sorted((row.is_teacher, round(row.advantage, 4)) for row in rows) == [(False, -0.45), (True, 0.45)]


def test_each_mini_batch_is_an_optimizer_step_and_later_ones_are_off_policy() -> None:
    train = TrainConfig(
        problems_per_step=2, mini_batch_problems=1, learning_rate=0.05, eps_low=0.01, eps_high=0.01
    )
    groups = [group(1.0, 0.1), group(1.0, 0.1)]
    report = updater(train).update(groups, member_advantages(groups, scale="none"))
    assert report["optimizer_steps"] == 2
    # The first step is on-policy (no ratio leaves the band); the big first update moves the second out of it.
    assert report["clip_ratio/low_mean"] + report["clip_ratio/high_mean"] > 0
    one = updater(train.model_copy(update={"mini_batch_problems": 2}))
    assert one.update(groups, member_advantages(groups, scale="none"))["clip_ratio/high_mean"] == 0


def logprobs_of(made: Updater, row: TrainSequence) -> list[float]:
    """[R] under the policy as it is."""
    batch = train_batch([row], pad_id=0, device=made.policy.device)
    with torch.no_grad():
        return made.policy.logprobs(batch)[batch.target_mask].tolist()


@pytest.mark.parametrize(
    ("advantage", "is_teacher", "rises"), [(0.5, False, True), (-0.5, False, False), (0.5, True, True)]
)
def test_a_sequence_becomes_likelier_by_the_sign_of_its_advantage(
    advantage: float, is_teacher: bool, rises: bool
) -> None:
    made = updater(TrainConfig(learning_rate=1e-3, entropy_coef=0.0))
    row = TrainSequence(prompt_ids=(2, 40), response_ids=(9, 1), advantage=advantage, is_teacher=is_teacher)
    before = sum(logprobs_of(made, row))
    made.optimizer_step([row])
    assert (sum(logprobs_of(made, row)) > before) is rises


def test_the_samplers_log_probabilities_are_compared_with_the_trainers() -> None:
    # The sampler is said to have been off by 0.25 on each of 2 + 1 student tokens; traces do not count.
    made = updater(TrainConfig())
    rows = [
        TrainSequence(prompt_ids=(2, 40), response_ids=(9, 1), advantage=0.5, is_teacher=False),
        TrainSequence(prompt_ids=(2,), response_ids=(7,), advantage=-0.5, is_teacher=False),
        TrainSequence(prompt_ids=(2,), response_ids=(9, 8, 7), advantage=0.5, is_teacher=True),
    ]
    known = [
        row
        if row.is_teacher
        else replace(row, sampler_logprobs=tuple(value + 0.25 for value in logprobs_of(made, row)))
        for row in rows
    ]
    assert made.optimizer_step(known)["sampling/logp_difference"] == pytest.approx(0.25, rel=1e-4)
    assert "sampling/logp_difference" not in made.optimizer_step(rows)


def test_a_mean_over_student_tokens_is_absent_without_one_and_not_zero() -> None:
    rows = sequences(0)
    made = updater(TrainConfig())
    without = made.optimizer_step([row for row in rows if row.is_teacher])
    assert without.keys() == {"loss", "grad_norm", "train_tokens"}
    assert without["loss"] != 0
    # The mean over two optimizer steps is that of the one that had student tokens.
    with_some = made.optimizer_step(rows)
    assert mean_metrics([without, with_some])["entropy"] == with_some["entropy"]


def test_the_entropy_bonus_raises_entropy() -> None:
    row = TrainSequence(prompt_ids=(2,), response_ids=(9, 1), advantage=1e-9, is_teacher=False)
    made = updater(TrainConfig(learning_rate=1e-2, entropy_coef=1.0))
    before = made.optimizer_step([row])["entropy"]
    for _ in range(3):
        report = made.optimizer_step([row])
    assert report["entropy"] > before


def test_a_frozen_model_under_its_adapters_is_their_reference(model_dir: Path) -> None:
    student = StudentConfig(model=str(model_dir), use_peft=True, device="cpu")
    policy = load_policy(student, temperature=1.0)
    plain = load_policy(StudentConfig(model=str(model_dir), device="cpu"), temperature=1.0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    batch = train_batch(sequences(0), pad_id=0, device=policy.device)
    with torch.no_grad():
        reference = policy.frozen_logprobs(batch)
        assert torch.allclose(reference, plain.logprobs(batch), atol=1e-5)
        assert not torch.allclose(reference, policy.logprobs(batch), atol=1e-2)


def test_beta_pulls_towards_the_reference() -> None:
    train = TrainConfig(beta=0.5, entropy_coef=0.0)
    reference = Policy(tiny_model(seed=1), tiny_tokenizer(), dtype=torch.float32)
    made = updater(train.model_copy(update={"learning_rate": 1e-2}), reference=reference.logprobs)
    row = TrainSequence(prompt_ids=(2,), response_ids=(9, 1), advantage=0.0, is_teacher=False)
    reports = [made.optimizer_step([row]) for _ in range(8)]
    assert reports[0]["kl"] > 0
    assert reports[-1]["kl"] < reports[0]["kl"]


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_sequences() -> None:
    made = updater(TrainConfig(max_tokens_per_microbatch=1))  # a micro-batch of its own for each
    before = [parameter.clone() for parameter in made.policy.model.parameters()]
    bad = replace(sequences(0)[0], advantage=float("nan"))
    with pytest.raises(NonFiniteError, match="not taken") as caught:
        made.optimizer_step([*sequences(1), bad])
    assert caught.value.sequences == (bad,)
    assert all(torch.equal(a, b) for a, b in zip(before, made.policy.model.parameters(), strict=True))


@pytest.mark.parametrize("guided", sorted(GUIDED_LOSSES))
def test_no_micro_batch_waits_for_the_device(guided: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors of the meta device have no values: to copy one to the host, or to find where a mask is true,
    # raises there and waits for all queued work on CUDA. Ratios of both kinds, entropy and KL are computed.
    train = TrainConfig(entropy_coef=0.1, beta=0.1, is_cap=2.0, dual_clip=3.0)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which meta does not have
    # transformers reads one value in each forward pass, before its first layer: are rows packed sequences?
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    policy = Policy(tiny_model().to("meta"), tiny_tokenizer(), dtype=torch.float32)
    insert = "context" if guided == "self_kl" else "trace"
    guidance = GuidanceConfig(loss=guided, insert=insert)
    made = updater_of(policy, train, guidance, reference=policy.logprobs)
    rows = [
        replace(s, old_logprobs=known, sampler_logprobs=known, n_guided=0 if s.is_teacher else 1)
        for s in sequences(0, teacher_logprobs=True)
        for known in [(-1.0,) * len(s.response_ids)]
    ]
    loss, sums = made._backward(rows, count(rows, 32))
    assert loss.is_meta
    assert {"entropy", "kl", "sampling/is_capped", "clip_ratio/low_mean"} <= sums.keys()


def test_an_optimizer_step_copies_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = updater(TrainConfig(max_tokens_per_microbatch=1))
    rows = [s for s in sequences(0) if not s.is_teacher]
    assert len(made.micro_batches(rows)) == 4
    copied: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copied.append(self.numel()) or tolist(self))
    made.optimizer_step(rows)
    # The gradient norm; of each micro-batch its loss, and sum and number of tokens of four metrics: entropy,
    # KL, and the tokens that are clipped on either side.
    assert copied == [1 + 4 * (1 + 2 * 4)]


@pytest.mark.parametrize("loss_type", sorted(REDUCTIONS))
@pytest.mark.parametrize("is_teacher", [True, False])
def test_a_row_without_advantage_counts_and_is_not_computed(loss_type: str, is_teacher: bool) -> None:
    # With an advantage of 1e-30 it is computed and adds nothing to a gradient of ordinary size.
    rows = sequences(3)
    idle = TrainSequence(prompt_ids=(2,), response_ids=(9,) * 7, advantage=0.0, is_teacher=is_teacher)
    gradients, reports = [], []
    for row in (idle, replace(idle, advantage=1e-30)):
        made = updater(TrainConfig(loss_type=loss_type, entropy_coef=0.0))
        gradients.append(keep_gradient(made))
        reports.append(made.optimizer_step([*rows, row]))
    (skipped,), (computed,) = gradients
    assert torch.allclose(skipped, computed, rtol=1e-5, atol=1e-8)
    assert reports[1]["train_tokens"] - reports[0]["train_tokens"] == 7


def test_a_row_without_advantage_keeps_its_entropy_bonus() -> None:
    rows = [
        TrainSequence(prompt_ids=(2,), response_ids=(9, 1), advantage=0.5, is_teacher=False),
        TrainSequence(prompt_ids=(2,), response_ids=(9, 8, 7), advantage=0.0, is_teacher=False),
        TrainSequence(prompt_ids=(2,), response_ids=(9, 8), advantage=0.0, is_teacher=True),
    ]
    assert updater(TrainConfig(entropy_coef=0.001)).optimizer_step(rows)["train_tokens"] == 2 + 3
    assert updater(TrainConfig(entropy_coef=0.0)).optimizer_step(rows)["train_tokens"] == 2


def test_later_mini_batches_find_the_old_log_probabilities_of_the_rows_they_compute() -> None:
    # Rewards 0.0, 0.5, 1.0: the middle row, of another length, has no advantage. No weight moves (lr 0), so
    # the second mini-batch's ratio is 1 on every token, and nothing is clipped.
    train = TrainConfig(problems_per_step=2, mini_batch_problems=1, learning_rate=0.0, entropy_coef=0.0)
    bad, middling, good = (sample_of(reward) for reward in (0.0, 0.5, 1.0))
    samples = (bad, replace(middling, token_ids=(9, 8, 7, 1)), replace(good, token_ids=(9, 8, 1)))
    groups = [replace(group(), samples=samples)] * 2
    made = updater(train.model_copy(update={"eps_low": 1e-4, "eps_high": 1e-4}))
    report = made.update(groups, member_advantages(groups, scale="none"))
    assert report["optimizer_steps"] == 2
    assert report["clip_ratio/low_mean"] == report["clip_ratio/high_mean"] == 0


def test_samples_that_were_cut_count_for_the_mean_and_train_nothing() -> None:
    # Rewards 1.0, 0.1, 0.1 (cut): the mean is 0.4, so 0.6 and -0.3 are left to train.
    cut = replace(
        group(1.0, 0.1, 0.1),
        samples=(sample_of(1.0), sample_of(0.1), replace(sample_of(0.1), finish_reason="length")),
    )
    advantages = member_advantages([cut], scale="none")
    assert len(sequences_of([cut], advantages)) == 3
    rows = sequences_of([cut], advantages, without_truncated=True)
    assert [round(row.advantage, 4) for row in rows] == [0.6, -0.3]
    counted = updater(TrainConfig(mask_truncated_completions=True)).update([cut], advantages)
    assert counted["train_tokens"] == 4


def test_the_8_bit_optimizer_keeps_its_state_in_8_bits() -> None:
    # bitsandbytes keeps tensors below 4,096 elements in 32 bits: this embedding has 4,096 * 32.
    big = Policy(tiny_model(vocab_size=4096), tiny_tokenizer(), dtype=torch.float32)
    optimizer = make_optimizer(big.model, TrainConfig(optim="adamw_8bit"))
    for parameter in big.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[big.model.get_input_embeddings().weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("loss_type", sorted(REDUCTIONS))
def test_an_idle_micro_batch_adds_nothing(loss_type: str) -> None:
    # What a rank computes that has fewer micro-batches than another.
    rows, reports, gradients = sequences(4), [], []
    for idle in ([], [[IDLE]]):
        reference = Policy(tiny_model(seed=1), tiny_tokenizer(), dtype=torch.float32)
        made = updater(TrainConfig(loss_type=loss_type, beta=0.1), reference=reference.logprobs)
        gradients.append(keep_gradient(made))
        reports.append(made.optimizer_step(rows, [*made.micro_batches(rows), *idle]))
    assert reports[0] == reports[1]
    assert torch.equal(gradients[0][0], gradients[1][0])
