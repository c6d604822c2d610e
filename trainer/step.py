"""One training step's update: advantages, mini-batches, micro-batches, optimizer steps.

groups --advantages--> sequences --counts--> weights --micro-batches--> gradient --clip--> optimizer step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.batch import TokenBatch, TrainSequence, fill, place_values, train_batch
from trainer.config import GuidanceConfig, TrainConfig
from trainer.groups import Group
from trainer.objective import (
    LOSS_TYPES,
    StepCounts,
    clipped_surrogate,
    count,
    group_advantages,
    kl_to_reference,
    reduce_terms,
    shaped_guidance,
)
from trainer.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What an update did: means over an optimizer step's student tokens, then over the optimizer steps."""

    loss: float
    """Mean over the optimizer steps."""
    grad_norm: float
    """Before clipping, mean over the optimizer steps."""
    entropy: float
    kl: float
    clip_low: float
    """Share of student tokens that clipping holds back: ratio below 1 - eps_low, advantage negative."""
    clip_high: float
    """Share of student tokens that clipping holds back: ratio above 1 + eps_high, advantage positive."""
    tokens: int
    """Response tokens that carried a gradient."""
    optimizer_steps: int
    sampler_difference: float | None = None
    """Mean |trainer's - sampler's log-probability| of a student token, on the first optimizer step, whose
    policy is the one that sampled; None where the sampler's are of another temperature or unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """One micro-batch's share of an optimizer step's sums."""

    loss: float
    entropy: float
    kl: float
    clip_low: float
    clip_high: float
    sampler_difference: float | None


class Updater:
    """Turns groups into optimizer steps."""

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        train: TrainConfig,
        guidance: GuidanceConfig,
        *,
        max_completion_length: int,
        reference: Policy | None = None,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.train = train
        self.guidance = guidance
        self.max_completion_length = max_completion_length
        self.reference = reference

    def update(self, groups: Sequence[Group], advantages: Tensor) -> UpdateReport:
        """One optimizer step for each mini-batch of `mini_batch_problems` groups.

        Args:
            advantages: [N, G] of the groups' members.
        """
        size = self.train.mini_batch_problems
        batches = [
            sequences_of(groups[start : start + size], advantages[start : start + size])
            for start in range(0, len(groups), size)
        ]
        live = [batch for batch in batches if batch]
        # The first optimizer step updates the very policy that sampled: its old log-probs are its own.
        old = [None, *(self._old_logprobs(batch) for batch in live[1:])]
        reports = [self.optimizer_step(batch, logprobs) for batch, logprobs in zip(live, old, strict=False)]
        return _mean_report(reports)

    def optimizer_step(
        self, sequences: Sequence[TrainSequence], old_logprobs: Sequence[Tensor] | None = None
    ) -> UpdateReport:
        """One optimizer step over `sequences`, however many micro-batches that takes.

        Args:
            old_logprobs: [R] of the sampling policy for each sequence; None: the current policy sampled.
        """
        counts = count_sequences(sequences, self.max_completion_length)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.model.train()
        parts = [self._backward(part, old, counts) for part, old in self._cut(sequences, old_logprobs)]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self.train.max_grad_norm)
        loss = sum(part.loss for part in parts)
        if not (torch.isfinite(norm) and abs(loss) < float("inf")):
            raise FloatingPointError(
                f"loss {loss} and gradient norm {float(norm)}: not finite; this optimizer step was not taken"
            )
        self.optimizer.step()
        # Freed now: while the student samples, nobody needs them.
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.model.eval()
        tokens = max(counts.student_tokens, 1)
        return UpdateReport(
            loss=loss,
            grad_norm=float(norm),
            entropy=sum(part.entropy for part in parts) / tokens,
            kl=sum(part.kl for part in parts) / tokens,
            clip_low=sum(part.clip_low for part in parts) / tokens,
            clip_high=sum(part.clip_high for part in parts) / tokens,
            tokens=counts.tokens,
            optimizer_steps=1,
            sampler_difference=_total([part.sampler_difference for part in parts], tokens),
        )

    def _parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]

    def _cut(
        self, sequences: Sequence[TrainSequence], old: Sequence[Tensor] | None
    ) -> list[tuple[list[TrainSequence], list[Tensor] | None]]:
        return [
            ([sequences[i] for i in indices], None if old is None else [old[i] for i in indices])
            for indices in fill(
                [sequence.length for sequence in sequences], self.train.max_tokens_per_microbatch
            )
        ]

    def _backward(
        self, sequences: Sequence[TrainSequence], old: Sequence[Tensor] | None, counts: StepCounts
    ) -> Partial:
        """Adds a micro-batch's gradient to what is there."""
        batch = train_batch(sequences, pad_id=self.policy.pad_id, device=self.policy.device)
        stats = self.policy.statistics(batch)
        old_logprobs = (
            stats.logprobs.detach()
            if old is None
            else place_values([row.tolist() for row in old], batch.asked)
        )
        is_teacher = torch.tensor([s.is_teacher for s in sequences], device=batch.asked.device)
        advantages = torch.tensor([[s.advantage] for s in sequences], device=batch.asked.device)
        terms = self._terms(sequences, stats.logprobs, old_logprobs, is_teacher, advantages, batch)
        lengths = batch.asked.sum(dim=1)
        weights = LOSS_TYPES[self.train.loss_type](lengths, is_teacher, counts)
        student = batch.asked & ~is_teacher.unsqueeze(1)
        kl = self._kl(batch, stats.logprobs)
        loss = reduce_terms(terms, batch.asked, weights)
        regulariser = self.train.beta * kl - self.train.entropy_coef * stats.entropy
        loss = loss + regulariser.masked_fill(~student, 0.0).sum() / max(counts.student_tokens, 1)
        loss.backward()  # type: ignore[no-untyped-call]
        ratio = torch.exp(stats.logprobs.detach() - old_logprobs)
        below = (ratio < 1 - self.train.eps_low) & (advantages < 0)
        above = (ratio > 1 + self.train.eps_high) & (advantages > 0)
        return Partial(
            loss=float(loss.detach()),
            entropy=float(stats.entropy.detach()[student].sum()),
            kl=float(kl.detach()[student].sum()),
            clip_low=float(below[student].sum()),
            clip_high=float(above[student].sum()),
            sampler_difference=self._sampler_difference(sequences, stats.logprobs, student)
            if old is None
            else None,
        )

    def _terms(
        self,
        sequences: Sequence[TrainSequence],
        logprobs: Tensor,
        old_logprobs: Tensor,
        is_teacher: Tensor,
        advantages: Tensor,
        batch: TokenBatch,
    ) -> Tensor:
        """[B, L], the term of every token by who wrote it; is_teacher [B], advantages [B, 1]."""
        teacher_logprobs = None
        if self.guidance.ratio == "teacher":
            teacher_logprobs = place_values([s.teacher_logprobs for s in sequences], batch.asked)
        student = clipped_surrogate(
            logprobs, old_logprobs, advantages, eps_low=self.train.eps_low, eps_high=self.train.eps_high
        )
        teacher = shaped_guidance(
            logprobs, advantages, gamma=self.guidance.gamma, teacher_logprobs=teacher_logprobs
        )
        return torch.where(is_teacher.unsqueeze(1), teacher, student)

    def _sampler_difference(
        self, sequences: Sequence[TrainSequence], logprobs: Tensor, student: Tensor
    ) -> float | None:
        """Sum over the student's tokens (`student`, [B, L]); None where the two cannot be compared."""
        known = all(s.is_teacher or s.sampler_logprobs is not None for s in sequences)
        if self.policy.temperature != 1.0 or not known:
            return None
        sampled = place_values([s.sampler_logprobs for s in sequences], student)
        return float((logprobs.detach() - sampled).abs()[student].sum())

    def _kl(self, batch: TokenBatch, logprobs: Tensor) -> Tensor:
        if self.reference is None:
            return torch.zeros_like(logprobs)
        with torch.no_grad():
            reference = self.reference.statistics(batch).logprobs
        return kl_to_reference(logprobs, reference)

    @torch.no_grad()
    def _old_logprobs(self, sequences: Sequence[TrainSequence]) -> list[Tensor]:
        """[R] for each sequence under the policy as it is now."""
        found: dict[int, Tensor] = {}
        lengths = [sequence.length for sequence in sequences]
        for indices in fill(lengths, self.train.max_tokens_per_microbatch):
            batch = train_batch(
                [sequences[i] for i in indices], pad_id=self.policy.pad_id, device=self.policy.device
            )
            logprobs = self.policy.statistics(batch).logprobs
            found.update({i: logprobs[b][batch.asked[b]].cpu() for b, i in enumerate(indices)})
        return [found[i] for i in range(len(sequences))]


def member_advantages(groups: Sequence[Group], *, scale: str) -> Tensor:
    """[N, G] advantages of the groups as they train."""
    rewards = torch.tensor([[member.reward for member in group.members] for group in groups])
    return group_advantages(rewards, scale=scale)


def sequences_of(groups: Sequence[Group], advantages: Tensor) -> list[TrainSequence]:
    """The sequences of groups that carry a gradient; a group of equal rewards has none and is left out."""
    return [
        TrainSequence(
            prompt_ids=group.prompt_ids,
            response_ids=member.token_ids,
            advantage=float(advantage),
            is_teacher=member.is_teacher,
            teacher_logprobs=member.logprobs if member.is_teacher else None,
            sampler_logprobs=None if member.is_teacher else member.logprobs,
        )
        for group, row in zip(groups, advantages, strict=True)
        if bool(row.any())
        for member, advantage in zip(group.members, row, strict=True)
    ]


def count_sequences(sequences: Sequence[TrainSequence], max_completion_length: int) -> StepCounts:
    """The counts that every micro-batch of an optimizer step divides by."""
    return count(
        torch.tensor([len(sequence.response_ids) for sequence in sequences]),
        torch.tensor([sequence.is_teacher for sequence in sequences]),
        max_length=max_completion_length,
    )


def _total(sums: Sequence[float | None], count: int) -> float | None:
    """The mean over `count`; None when any sum is unknown."""
    known = [each for each in sums if each is not None]
    return sum(known) / count if len(known) == len(sums) else None


def _mean_report(reports: Sequence[UpdateReport]) -> UpdateReport:
    n = max(len(reports), 1)
    return UpdateReport(
        loss=sum(report.loss for report in reports) / n,
        grad_norm=sum(report.grad_norm for report in reports) / n,
        entropy=sum(report.entropy for report in reports) / n,
        kl=sum(report.kl for report in reports) / n,
        clip_low=sum(report.clip_low for report in reports) / n,
        clip_high=sum(report.clip_high for report in reports) / n,
        tokens=sum(report.tokens for report in reports),
        optimizer_steps=len(reports),
        sampler_difference=reports[0].sampler_difference if reports else None,
    )
