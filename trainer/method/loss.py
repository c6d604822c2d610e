"""The loss of a micro-batch: advantages, token terms and reductions, each chosen by name from the config.

    student token:  min(rho * A, clip(rho, 1 - eps_low, 1 + eps_high) * A),   rho = pi_theta / pi_old
    guided token:   f(x) * A,  f(x) = x / (x + gamma),   x = pi_theta  or  pi_theta / pi_teacher

    loss = -sum of weight * term  +  (beta * KL - entropy_coef * entropy) / T_on over student tokens

A reduction gives each sequence its weight from counts taken once over the whole optimizer step, so neither
cuts into micro-batches nor padding change loss or gradient. Pure: no I/O, no hidden randomness.

Shapes: B sequences, T tokens, N groups, G samples of a group. Sources: AMPO 2510.02227, sections 3.2 and 3.4;
GRPO 2402.03300; DAPO 2503.14476; Dr. GRPO 2503.20783; GSPO 2507.18071; dual clip 1912.09729.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from store.registry import lookup
from trainer.config import GuidanceConfig, TrainConfig


def group_advantages(rewards: Tensor, *, scale: str, baseline: Tensor | None = None) -> Tensor:
    """Returns A_i = R_i - mean(R) [N, G] within each group of `rewards` [N, G], guidance included.

    `scale`: `none`, or `group` to divide by the group's sample standard deviation (n - 1, as TRL does). A
    group whose rewards are all equal gets zeros under either. `baseline` [N, B]: rewards that give mean and
    deviation; None: the group's.
    """
    rewards = rewards.float()
    baseline = rewards if baseline is None else baseline.float()
    advantages = rewards - baseline.mean(dim=1, keepdim=True)
    equal = (rewards == baseline[:, :1]).all(dim=1, keepdim=True)
    equal &= (baseline == baseline[:, :1]).all(dim=1, keepdim=True)
    if scale == "group":
        deviation = baseline.std(dim=1, keepdim=True)
        advantages = advantages / torch.where(deviation > 0, deviation, 1.0)
    elif scale != "none":
        raise ValueError(f"scale = {scale!r}: give none or group")
    return advantages.masked_fill(equal, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Counts of a whole optimizer step, over the groups that carry a gradient; every denominator is here."""

    sequences: int
    """N, student and teacher sequences."""
    student_sequences: int
    """N_on."""
    student_tokens: int
    """T_on."""
    guided_tokens: int
    """T_off, response tokens of the teachers' traces."""
    max_length: int
    """L_max, max_completion_length."""
    guided_weight: float = 1.0
    """mu, the weight of the guided tokens' loss in this step."""
    student_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """A micro-batch; every [B, T] is 0 outside the responses."""

    logprobs: Tensor
    """[B, T] under the current policy, with gradient."""
    entropy: Tensor
    """[B, T] in nats, with gradient."""
    old_logprobs: Tensor
    """[B, T] under the policy that sampled."""
    response_mask: Tensor
    """[B, T] bool."""
    is_teacher: Tensor
    """[B] bool."""
    guided_mask: Tensor | None = None
    """[B, T] bool, tokens that a teacher wrote; None: those of `is_teacher`."""
    advantages: Tensor
    """[B, 1]"""
    teacher_logprobs: Tensor
    """[B, T] under the teacher; 0 where they are not read (see `GuidanceConfig.reads_teacher_logprobs`)."""
    sampler_logprobs: Tensor | None = None
    """[B, T] as the engine that sampled the student's tokens computed them; None where it does not give
    them."""
    reference_logprobs: Tensor | None = None
    """[B, T] under the student before training; None without a KL term."""


Terms = tuple[Tensor, dict[str, Tensor]]
"""([B, T] to maximise, metric name -> [B, T] a value of each token). The metric is the mean over the tokens
that the function is responsible for: the student's, or the guided ones."""
Sums = dict[str, tuple[Tensor, Tensor]]
"""Metric name -> (sum over tokens, number of tokens), scalars on the device: copying one waits for it."""
MicroLoss = Callable[[LossInputs, StepCounts], tuple[Tensor, Sums]]
"""Returns a micro-batch's share of the optimizer step's loss (scalar, with gradient) and its metrics."""


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """Returns [B, T] min(rho * A, clip(rho, 1 - eps_low, 1 + eps_high) * A), to maximise, of the current and
    the sampling policy's logprobs [B, T] and of advantages [B, 1]."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def clip(inputs: LossInputs, train: TrainConfig) -> Terms:
    """The clipped surrogate of PPO and GRPO, per token or per response (GSPO), with dual clip and a
    correction for what the sampler's engine computed otherwise."""
    log_ratio, advantages = inputs.logprobs - inputs.old_logprobs, inputs.advantages
    if train.importance_sampling_level == "sequence":  # GSPO, equation 7: the mean log-ratio of the response
        mask = inputs.response_mask
        total = log_ratio.masked_fill(~mask, 0.0).sum(dim=1, keepdim=True)
        log_ratio = torch.where(mask, total / mask.sum(dim=1, keepdim=True).clamp(min=1), 0.0)
    terms = clipped_surrogate(
        log_ratio, torch.zeros_like(log_ratio), advantages, eps_low=train.eps_low, eps_high=train.eps_high
    )
    if train.dual_clip:  # a ratio that exploded cannot make one bad token the whole gradient
        bounded = torch.maximum(terms, train.dual_clip * advantages)
        terms = torch.where(advantages < 0, bounded, terms)
    ratio = torch.exp(log_ratio.detach())
    metrics = {
        "clip_ratio/low_mean": (ratio < 1 - train.eps_low) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > 1 + train.eps_high) & (advantages > 0),
    }
    if inputs.sampler_logprobs is not None:
        difference = inputs.old_logprobs - inputs.sampler_logprobs
        # Truncated importance sampling, token by token (Espeholt et al. 2018, arXiv 1802.01561, rho-bar).
        weights, cap = torch.exp(difference), train.is_cap or torch.inf
        terms = terms * weights.clamp(max=cap).detach() if train.is_cap else terms
        metrics |= {"sampling/logp_difference": difference.abs(), "sampling/is_capped": weights > cap}
    return terms, metrics


OBJECTIVES: dict[str, Callable[[LossInputs, TrainConfig], Terms]] = {"clip": clip}
"""`train.objective`: terms of the student's tokens."""


def shaped_guidance(
    logprobs: Tensor, advantages: Tensor, *, gamma: float, teacher_logprobs: Tensor | None = None
) -> Tensor:
    """Returns [B, T] f(x) * A, to maximise, of the current policy's logprobs [B, T] and of advantages [B, 1].

    f lifts tokens that the student finds unlikely: their plain gradient would vanish with their probability.
    With `teacher_logprobs` [B, T], x = pi_theta / pi_teacher (equation 7), else x = pi_theta.
    """
    log_x = logprobs if teacher_logprobs is None else logprobs - teacher_logprobs
    # x / (x + gamma) = 1 / (1 + gamma / x): the sigmoid form neither over- nor underflows.
    return torch.sigmoid(log_x - torch.log(torch.tensor(gamma, dtype=log_x.dtype))) * advantages


GuidedTerms = tuple[Tensor, Tensor | float | None, dict[str, Tensor]]
"""([B, T] to maximise, weight of a guided token, metrics as in Terms). The weight, [B, 1] or one number, is
for a loss with a denominator of its own, e.g. 1 / counts.guided_tokens; None: the reduction's."""


def shaped(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
    """x = pi_theta: the teacher's probability is taken as 1, as in the published runs."""
    return shaped_guidance(inputs.logprobs, inputs.advantages, gamma=guidance.gamma), None, {}


def shaped_ratio(inputs: LossInputs, counts: StepCounts, guidance: GuidanceConfig) -> GuidedTerms:
    """x = pi_theta / pi_teacher: the paper's equation 7."""
    logprobs, teacher = inputs.logprobs, inputs.teacher_logprobs
    terms = shaped_guidance(logprobs, inputs.advantages, gamma=guidance.gamma, teacher_logprobs=teacher)
    return terms, None, {}


GuidedLoss = Callable[[LossInputs, StepCounts, GuidanceConfig], GuidedTerms]
GUIDED_LOSSES: dict[str, GuidedLoss] = {"shaped": shaped, "shaped_ratio": shaped_ratio}
"""`guidance.loss`: terms of the guided tokens, those of teacher traces."""


def ampo(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """Each teacher trace weighs the same however long; student tokens weigh the same (section 3.4).

    L = -(1/N) [ sum_teacher mean_t(term) + (N_on / T_on) sum_student,t term ]; without a teacher sequence
    this is DAPO's token mean.
    """
    teacher = 1.0 / (counts.sequences * lengths)
    student = counts.student_sequences / (counts.sequences * max(counts.student_tokens, 1))
    return torch.where(is_teacher, teacher, torch.full_like(teacher, student))


def dr_grpo(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """L = -(1 / (N L_max)) * sum of all terms: a constant length, so none is favoured."""
    return torch.full_like(lengths, 1.0 / (counts.sequences * counts.max_length), dtype=torch.float32)


def dapo(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """The mean over all tokens of the step."""
    tokens = counts.student_tokens + counts.guided_tokens
    return torch.full_like(lengths, 1.0 / tokens, dtype=torch.float32)


def grpo(lengths: Tensor, is_teacher: Tensor, counts: StepCounts) -> Tensor:
    """The mean over sequences of the mean over a sequence's tokens."""
    return 1.0 / (counts.sequences * lengths)


Reduction = Callable[[Tensor, Tensor, StepCounts], Tensor]
REDUCTIONS: dict[str, Reduction] = {"ampo": ampo, "dr_grpo": dr_grpo, "dapo": dapo, "grpo": grpo}
"""`train.loss_type`: (lengths [B], is_teacher [B], counts) -> [B], the weight of every token of a
sequence."""


def make_policy_loss(train: TrainConfig, guidance: GuidanceConfig) -> MicroLoss:
    """Returns the loss that the config names. Raises ConfigError for a name that does not exist."""
    objective = lookup(OBJECTIVES, train.objective, key="train.objective")
    guided_loss = lookup(GUIDED_LOSSES, guidance.loss, key="guidance.loss")
    reduction = lookup(REDUCTIONS, train.loss_type, key="train.loss_type")

    def policy_loss(inputs: LossInputs, counts: StepCounts) -> tuple[Tensor, Sums]:
        is_guided = inputs.is_teacher.unsqueeze(1) if inputs.guided_mask is None else inputs.guided_mask
        student, guided = inputs.response_mask & ~is_guided, inputs.response_mask & is_guided
        # Each sees its own tokens of a response that a teacher began.
        student_terms, student_values = objective(replace(inputs, response_mask=student), train)
        guided_terms, guided_weights, guided_values = guided_loss(
            replace(inputs, response_mask=guided), counts, guidance
        )
        lengths = inputs.response_mask.sum(dim=1).clamp(min=1)
        if guided_weights is not None:  # with a denominator of their own they are none of the reduction's
            counts = replace(counts, sequences=max(counts.student_sequences, 1), guided_tokens=0)
        weights = reduction(lengths, inputs.is_teacher, counts).unsqueeze(1)
        guided_weights = weights if guided_weights is None else guided_weights
        weights = torch.where(
            is_guided, guided_weights * counts.guided_weight, weights * counts.student_weight
        )
        terms = torch.where(is_guided, guided_terms, student_terms)
        loss = -(terms.masked_fill(~inputs.response_mask, 0.0) * weights).sum()
        kl = torch.zeros_like(inputs.logprobs)
        if inputs.reference_logprobs is not None:  # KL(pi_theta || pi_ref) by the k3 estimator
            log_ratio = inputs.reference_logprobs - inputs.logprobs
            kl = torch.exp(log_ratio) - log_ratio - 1.0
        # A term without weight needs no backward pass.
        entropy = inputs.entropy if train.entropy_coef else inputs.entropy.detach()
        regulariser = (train.beta * kl - train.entropy_coef * entropy).masked_fill(~student, 0.0).sum()
        loss = loss + regulariser / max(counts.student_tokens, 1)
        student_values |= {"entropy": inputs.entropy, "kl": kl}
        return loss, token_sums(student_values, student) | token_sums(guided_values, guided)

    return policy_loss


def token_sums(values: dict[str, Tensor], mask: Tensor) -> Sums:
    """Returns each metric's sum over the true tokens of `mask` [B, T] and their number."""
    tokens = mask.sum()
    return {name: (value.detach().masked_fill(~mask, 0).sum(), tokens) for name, value in values.items()}
