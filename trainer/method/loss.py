"""The loss of a micro-batch: the config's rule put together from the pure functions of `objective`.

    student token: weight * sampler's correction * clipped surrogate     teacher token: weight * f(x) * A
    + beta * KL - entropy_coef * entropy, over student tokens

Pure: tensors, the config's numbers and the step's counts in, the micro-batch's share of the loss out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import GuidanceConfig, TrainConfig
from trainer.method.objective import (
    LOSS_TYPES,
    StepCounts,
    clipped_surrogate,
    dual_clip,
    kl_to_reference,
    reduce_terms,
    sampler_weights,
    sequence_log_ratio,
    shaped_guidance,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """A micro-batch as the loss sees it; every [B, L] is 0 outside the responses."""

    logprobs: Tensor
    """[B, L] under the current policy, with gradient."""
    entropy: Tensor
    """[B, L] in nats, with gradient."""
    old_logprobs: Tensor
    """[B, L] under the policy that sampled."""
    response_mask: Tensor
    """[B, L] bool."""
    is_teacher: Tensor
    """[B] bool."""
    advantages: Tensor
    """[B, 1]"""
    teacher_logprobs: Tensor | None = None
    """[B, L] under `ratio = "teacher"`."""
    sampler_logprobs: Tensor | None = None
    """[B, L] as the engine that drew the student's tokens saw them; None where they are not known."""
    reference_logprobs: Tensor | None = None
    """[B, L] under the student as it was before training; None without a KL term."""

    @property
    def student_mask(self) -> Tensor:
        """[B, L] bool, the student's own response tokens."""
        return self.response_mask & ~self.is_teacher.unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """One micro-batch's share of an optimizer step's sums, over student tokens."""

    loss: float
    entropy: float
    kl: float
    clip_low: float
    """Tokens that clipping holds back: ratio below 1 - eps_low, advantage negative."""
    clip_high: float
    """Tokens that clipping holds back: ratio above 1 + eps_high, advantage positive."""
    sampler_difference: float | None
    """Of |trainer's - sampler's log-probability|; None where the sampler's are not known."""
    sampler_capped: float | None
    """Tokens whose correction is_cap holds back."""


MicroLoss = Callable[[LossInputs, TrainConfig, GuidanceConfig, StepCounts], tuple[Tensor, Partial]]
"""What `micro_loss` is."""


def micro_loss(
    inputs: LossInputs, train: TrainConfig, guidance: GuidanceConfig, counts: StepCounts
) -> tuple[Tensor, Partial]:
    """A micro-batch's share of the optimizer step's loss (scalar, with gradient), and what is reported."""
    log_ratio = _log_ratio(inputs, train)
    student = _student_terms(inputs, log_ratio, train)
    teacher = shaped_guidance(
        inputs.logprobs, inputs.advantages, gamma=guidance.gamma, teacher_logprobs=inputs.teacher_logprobs
    )
    terms = torch.where(inputs.is_teacher.unsqueeze(1), teacher, student)
    lengths = inputs.response_mask.sum(dim=1)
    weights = LOSS_TYPES[train.loss_type](lengths, inputs.is_teacher, counts)
    kl = _kl(inputs)
    # What weighs nothing needs no backward pass.
    entropy = inputs.entropy if train.entropy_coef else inputs.entropy.detach()
    regulariser = (train.beta * kl - train.entropy_coef * entropy)[inputs.student_mask].sum()
    loss = reduce_terms(terms, inputs.response_mask, weights)
    loss = loss + regulariser / max(counts.student_tokens, 1)
    return loss, _partial(inputs, loss, kl, log_ratio, train)


def _log_ratio(inputs: LossInputs, train: TrainConfig) -> Tensor:
    """[B, L], of each token, or of its whole response."""
    if train.importance_sampling_level == "sequence":
        return sequence_log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.response_mask)
    return inputs.logprobs - inputs.old_logprobs


def _student_terms(inputs: LossInputs, log_ratio: Tensor, train: TrainConfig) -> Tensor:
    """[B, L], as if every row were the student's own."""
    terms = clipped_surrogate(
        log_ratio,
        torch.zeros_like(log_ratio),
        inputs.advantages,
        eps_low=train.eps_low,
        eps_high=train.eps_high,
    )
    if train.dual_clip:
        terms = dual_clip(terms, inputs.advantages, bound=train.dual_clip)
    if train.is_cap and inputs.sampler_logprobs is not None:
        terms = terms * sampler_weights(inputs.old_logprobs, inputs.sampler_logprobs, cap=train.is_cap)
    return terms


def _kl(inputs: LossInputs) -> Tensor:
    if inputs.reference_logprobs is None:
        return torch.zeros_like(inputs.logprobs)
    return kl_to_reference(inputs.logprobs, inputs.reference_logprobs)


@torch.no_grad()
def _partial(inputs: LossInputs, loss: Tensor, kl: Tensor, log_ratio: Tensor, train: TrainConfig) -> Partial:
    student, ratio = inputs.student_mask, torch.exp(log_ratio)
    below = (ratio < 1 - train.eps_low) & (inputs.advantages < 0)
    above = (ratio > 1 + train.eps_high) & (inputs.advantages > 0)
    difference = capped = None
    if inputs.sampler_logprobs is not None:
        apart = inputs.old_logprobs - inputs.sampler_logprobs
        difference = float(apart.abs()[student].sum())
        capped = float((torch.exp(apart) > train.is_cap)[student].sum()) if train.is_cap else 0.0
    return Partial(
        loss=float(loss),
        entropy=float(inputs.entropy[student].sum()),
        kl=float(kl[student].sum()),
        clip_low=float(below[student].sum()),
        clip_high=float(above[student].sum()),
        sampler_difference=difference,
        sampler_capped=capped,
    )
