"""The objective, as pure functions: no configuration, no I/O, no hidden randomness.

    student token:  min(rho * A, clip(rho, 1 - eps_low, 1 + eps_high) * A),   rho = pi_theta / pi_old
    teacher token:  f(x) * A,  f(x) = x / (x + gamma),   x = pi_theta  or  pi_theta / pi_teacher

A loss is -(sum over tokens of weight * term). A `loss_type` is a function that gives each sequence its
weight from counts taken once over the whole optimizer step, so cutting a step into micro-batches, or
padding it, cannot change loss or gradient.

Shapes: B sequences, T token columns, V vocabulary, N groups, G samples of a group.
Source: arXiv 2510.02227 (AMPO), sections 3.2 and 3.4; GRPO 2402.03300; DAPO 2503.14476; Dr. GRPO 2503.20783.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability of every token given those before it.

    Args:
        logits: [B, T, V]; row t predicts token t + 1.
        input_ids: [B, T].

    Returns:
        [B, T] float32: column t is the log-probability of token t; column 0, which nothing predicts, is 0.
    """
    if logits.shape[:2] != input_ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not go with input_ids {tuple(input_ids.shape)}")
    chosen = selective_log_softmax(logits[:, :-1].float(), input_ids[:, 1:])
    return torch.nn.functional.pad(chosen, (1, 0))


def selective_log_softmax(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probability of the chosen entries.

    Args:
        logits: [..., V].
        chosen: [...], indices into V.

    Returns:
        [...], log softmax at `chosen`.
    """
    return _chosen(logits, chosen) - torch.logsumexp(logits, dim=-1)


def log_softmax_and_entropy(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the chosen entries and entropy of their distributions.

    Args as `selective_log_softmax`.

    Returns:
        ([...], [...]): log softmax at `chosen`; entropy in nats.
    """
    log_total = torch.logsumexp(logits, dim=-1)
    probabilities = torch.exp(logits - log_total.unsqueeze(-1))
    # -inf logits (masked tokens) have probability 0 and add nothing: 0 * -inf would be nan.
    expected = (probabilities * logits.masked_fill(probabilities == 0, 0.0)).sum(dim=-1)
    return _chosen(logits, chosen) - log_total, log_total - expected


def _chosen(logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def group_advantages(rewards: Tensor, *, scale: str) -> Tensor:
    """A_i = R_i - mean(R) within each group, over the group as it trains (guidance included).

    Args:
        rewards: [N, G].
        scale: `none`, or `group` to divide by the group's sample standard deviation (n - 1, as TRL does).

    Returns:
        [N, G]; a group whose rewards are all equal gets zeros under either scale.
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    if scale == "none":
        return centred.masked_fill(equal, 0.0)
    if scale == "group":
        return (centred / rewards.std(dim=1, keepdim=True)).masked_fill(equal, 0.0)
    raise ValueError(f"scale = {scale!r}: give none or group")


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """The student token's term, to maximise: min(rho * A, clip(rho, 1 - eps_low, 1 + eps_high) * A).

    Args:
        logprobs, old_logprobs: [B, T], of the current and of the sampling policy.
        advantages: [B, 1].

    Returns:
        [B, T].
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """The log of GSPO's sequence ratio, s = (pi_theta(o) / pi_old(o))^(1/|o|), on every token of a response.

    In the place of a token's log-ratio it clips, or lets pass, a response as a whole. Source: GSPO
    (arXiv 2507.18071), equation 7.

    Args:
        logprobs, old_logprobs: [B, T], of the current and of the sampling policy.
        response_mask: [B, T] bool.

    Returns:
        [B, T]: a row's mean log-ratio over its response, 0 elsewhere.
    """
    mask = response_mask.bool()
    total = (logprobs - old_logprobs).masked_fill(~mask, 0.0).sum(dim=1, keepdim=True)
    return torch.where(mask, total / mask.sum(dim=1, keepdim=True).clamp(min=1), 0.0)


def dual_clip(terms: Tensor, advantages: Tensor, *, bound: float) -> Tensor:
    """max(term, bound * A) where A < 0: a ratio that exploded cannot make one bad token the whole gradient.

    Source: dual-clip PPO (arXiv 1912.09729), equation 5.

    Args:
        terms: [B, T], from `clipped_surrogate`.
        advantages: [B, 1].
        bound: c > 1, the largest ratio that counts against a response.

    Returns:
        [B, T].
    """
    return torch.where(advantages < 0, torch.maximum(terms, bound * advantages), terms)


def sampler_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap): what another engine draws too often weighs less, too seldom more.

    Truncated importance sampling, token by token (Espeholt et al. 2018, arXiv 1802.01561, rho-bar).

    Args:
        old_logprobs: [B, T] as the trainer computes them for the policy that sampled.
        sampler_logprobs: [B, T] as the engine that drew the tokens did.
        cap: the largest weight.

    Returns:
        [B, T], without a gradient.
    """
    return torch.exp(old_logprobs - sampler_logprobs).clamp(max=cap).detach()


def shaped_guidance(
    logprobs: Tensor, advantages: Tensor, *, gamma: float, teacher_logprobs: Tensor | None = None
) -> Tensor:
    """The teacher token's term, to maximise: f(x) * A with f(x) = x / (x + gamma).

    f lifts tokens that the student finds unlikely, whose plain gradient would vanish with their probability.

    Args:
        logprobs: [B, T], of the current policy on the teacher's tokens.
        advantages: [B, 1].
        gamma: above 0.
        teacher_logprobs: [B, T]; given, x = pi_theta / pi_teacher (equation 7), else x = pi_theta.

    Returns:
        [B, T].
    """
    log_x = logprobs if teacher_logprobs is None else logprobs - teacher_logprobs
    # x / (x + gamma) = 1 / (1 + gamma / x): the sigmoid form neither over- nor underflows.
    return torch.sigmoid(log_x - torch.log(torch.tensor(gamma, dtype=log_x.dtype))) * advantages


def kl_to_reference(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) per sampled token by the k3 estimator: r - log r - 1, r = pi_ref / pi_theta.

    Args and returns: [B, T]; never negative, 0 where the two agree.
    """
    log_ratio = reference_logprobs - logprobs
    return torch.exp(log_ratio) - log_ratio - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What a whole optimizer step holds; every denominator comes from here."""

    sequences: int
    """N, student and teacher sequences of groups that carry a gradient."""
    student_sequences: int
    """N_on."""
    student_tokens: int
    """T_on."""
    tokens: int
    """Student and teacher response tokens."""
    max_length: int
    """L_max: max_completion_length."""


def count(lengths: Tensor, is_teacher: Tensor, *, max_length: int) -> StepCounts:
    """The counts of one optimizer step.

    Args:
        lengths: [B] response tokens of every sequence of the step.
        is_teacher: [B] bool.
    """
    student = ~is_teacher
    return StepCounts(
        sequences=lengths.numel(),
        student_sequences=int(student.sum()),
        student_tokens=int(lengths[student].sum()),
        tokens=int(lengths.sum()),
        max_length=max_length,
    )


def ampo_weights(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """Each teacher trace weighs the same however long; student tokens weigh the same (section 3.4).

    L = -(1/N) [ sum_teacher mean_t(term) + (N_on / T_on) sum_student,t term ]

    Without a teacher sequence this is DAPO's token mean.
    """
    teacher = 1.0 / (counts.sequences * lengths)
    student = counts.student_sequences / (counts.sequences * max(counts.student_tokens, 1))
    return torch.where(is_teacher, teacher, torch.full_like(teacher, student))


def dr_grpo_weights(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """L = -(1 / (N L_max)) * sum of all terms: a constant length, so none is favoured."""
    return torch.full_like(lengths, 1.0 / (counts.sequences * counts.max_length), dtype=torch.float32)


def dapo_weights(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """The mean over all tokens of the step."""
    return torch.full_like(lengths, 1.0 / counts.tokens, dtype=torch.float32)


def grpo_weights(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """The mean over sequences of the mean over a sequence's tokens."""
    return 1.0 / (counts.sequences * lengths)


SequenceWeights = Callable[[Tensor, Tensor, StepCounts], Tensor]
"""(lengths [B], is_teacher [B], counts) -> [B], the weight of every token of each sequence."""

LOSS_TYPES: dict[str, SequenceWeights] = {
    "ampo": ampo_weights,
    "dr_grpo": dr_grpo_weights,
    "dapo": dapo_weights,
    "grpo": grpo_weights,
}
"""`train.loss_type`; a new reduction is a new short function here."""


def reduce_terms(terms: Tensor, response_mask: Tensor, weights: Tensor) -> Tensor:
    """A micro-batch's share of the step's loss: -(sum of weight * term); the shares add up to the loss.

    Args:
        terms: [B, T], to maximise.
        response_mask: [B, T] bool.
        weights: [B], from one of LOSS_TYPES.

    Returns:
        scalar.
    """
    return -(terms.masked_fill(~response_mask.bool(), 0.0) * weights.unsqueeze(1)).sum()
