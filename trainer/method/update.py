"""One training step's update: advantages, mini-batches, micro-batches, optimizer steps.

groups --advantages--> sequences --counts--> weights --micro-batches--> gradient --clip--> optimizer step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import GuidanceConfig, TrainConfig
from trainer.method.groups import Group
from trainer.method.loss import LossInputs, MicroLoss, Partial, micro_loss
from trainer.method.objective import StepCounts, count, group_advantages
from trainer.parallel.fsdp import full_tensor, gathered_weights
from trainer.parallel.world import ALONE, World
from trainer.student.batches import TokenBatch, TrainSequence, deal, fill, place_values, train_batch
from trainer.student.policy import Policy, Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What an update did: means over an optimizer step's student tokens that carry a gradient, then over the
    optimizer steps that have such tokens; None where none has."""

    loss: float
    """Mean over the optimizer steps."""
    grad_norm: float
    """Before clipping, mean over the optimizer steps."""
    entropy: float | None
    kl: float | None
    clip_low: float | None
    """Share of student tokens that clipping holds back: ratio below 1 - eps_low, advantage negative."""
    clip_high: float | None
    """Share of student tokens that clipping holds back: ratio above 1 + eps_high, advantage positive."""
    tokens: int
    """Response tokens that carried a gradient."""
    optimizer_steps: int
    sampler_difference: float | None = None
    """Mean |trainer's - sampler's log-probability| of a student token under the policy that sampled; None
    where the sampler's are not known."""
    sampler_capped: float | None = None
    """Share of student tokens whose correction is_cap holds back."""


IDLE = TrainSequence(prompt_ids=(0,), response_ids=(0,), advantage=0.0, is_teacher=False)
"""What a process computes on when it has nothing left of an optimizer step, and others have."""


class NotFiniteError(FloatingPointError):
    """A loss or a gradient that is no number; the optimizer step was not taken, the weights are whole."""

    def __init__(self, message: str, sequences: Sequence[TrainSequence]) -> None:
        super().__init__(f"{message}: not finite; this optimizer step was not taken")
        self.sequences = tuple(sequences)
        """The micro-batch that it came from; the whole optimizer step where only its gradient tells."""


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
        reference: Reference | None = None,
        world: World = ALONE,
        loss: MicroLoss = micro_loss,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.train = train
        self.guidance = guidance
        self.max_completion_length = max_completion_length
        self.reference = reference
        self.world = world
        self.loss = loss

    def update(self, groups: Sequence[Group], advantages: Tensor) -> UpdateReport:
        """One optimizer step for each mini-batch of `mini_batch_problems` groups.

        Args:
            groups, advantages: the whole step's, in every process; advantages [N, G] of the members.
        """
        size = self.train.mini_batch_problems
        masked = self.train.mask_truncated_completions
        batches = [
            sequences_of(groups[i : i + size], advantages[i : i + size], without_truncated=masked)
            for i in range(0, len(groups), size)
        ]
        live = [batch for batch in batches if self._trained_on(batch)]
        # The first optimizer step updates the very policy that sampled: its old log-probs are its own.
        old = [None, *(self._old_logprobs(self._share(self._trained_on(batch))) for batch in live[1:])]
        reports = [self.optimizer_step(batch, logprobs) for batch, logprobs in zip(live, old, strict=False)]
        return mean_report(reports)

    def optimizer_step(
        self, sequences: Sequence[TrainSequence], old_logprobs: Sequence[Tensor] | None = None
    ) -> UpdateReport:
        """One optimizer step over `sequences`, however many micro-batches and processes that takes.

        Args:
            sequences: the whole optimizer step's, in every process.
            old_logprobs: [R] of the sampling policy for each sequence of this process's share of those that
                carry a gradient; None: the current policy sampled.
        """
        counts = count_sequences(sequences, self.max_completion_length)
        trained = self._trained_on(sequences)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.model.train()
        parts = self._gradient(trained, old_logprobs, counts)
        norm = self._clip()
        loss = sum(part.loss for part in parts)
        if not torch.isfinite(norm):
            raise NotFiniteError(f"gradient norm {float(norm)} at a loss of {loss:.4g}", trained)
        self.optimizer.step()
        # Freed now: while the student samples, nobody needs them.
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.model.eval()
        computed = count_sequences(trained, self.max_completion_length)
        tokens = computed.student_tokens
        return UpdateReport(
            loss=loss,
            grad_norm=float(norm),
            entropy=_total([part.entropy for part in parts], tokens),
            kl=_total([part.kl for part in parts], tokens),
            clip_low=_total([part.clip_low for part in parts], tokens),
            clip_high=_total([part.clip_high for part in parts], tokens),
            tokens=computed.tokens,
            optimizer_steps=1,
            sampler_difference=_total([part.sampler_difference for part in parts], tokens),
            sampler_capped=_total([part.sampler_capped for part in parts], tokens),
        )

    def _gradient(
        self, sequences: Sequence[TrainSequence], old: Sequence[Tensor] | None, counts: StepCounts
    ) -> list[Partial]:
        """Leaves the gradient in the weights; returns every process's shares of the sums."""
        cut = self._cut(self._share(sequences), old)
        parts = [self._backward(part, part_old, counts) for part, part_old in cut]
        for _ in range(self._passes(sequences) - len(cut)):
            self._idle_pass()
        failed = [
            (found.loss, part)
            for (part, _), found in zip(cut, parts, strict=True)
            if not math.isfinite(found.loss)
        ]
        shares = self.world.gather((parts, failed))
        for loss, part in (each for _, unusable in shares for each in unusable):
            raise NotFiniteError(f"loss {loss} of a micro-batch", part)
        return [part for parts, _ in shares for part in parts]

    def _clip(self) -> Tensor:
        """Scales the gradient down to max_grad_norm; returns the norm that it had, over all processes."""
        parameters = [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(parameters, self.train.max_grad_norm, norm)
        return norm

    def _trained_on(self, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
        """Those that carry a gradient; the others count, and are not computed."""
        regularised = bool(self.train.entropy_coef or self.reference)
        return [s for s in sequences if s.advantage != 0 or (regularised and not s.is_teacher)]

    def _share(self, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
        """What this process trains on of an optimizer step."""
        lengths = [sequence.length for sequence in sequences]
        return [sequences[i] for i in deal(lengths, self.world.size)[self.world.rank]]

    def _passes(self, sequences: Sequence[TrainSequence]) -> int:
        """Micro-batches of the process that has the most of them."""
        lengths, budget = [sequence.length for sequence in sequences], self.train.max_tokens_per_microbatch
        return max(len(fill([lengths[i] for i in share], budget)) for share in deal(lengths, self.world.size))

    def _idle_pass(self) -> None:
        """A pass that adds nothing, by a process that has fewer micro-batches: weights are gathered and
        gradients summed by all processes at once, and in one order."""
        batch = train_batch([IDLE], pad_id=self.policy.pad_id, device=self.policy.device)
        logprobs = self.policy.statistics(batch).logprobs
        self._reference_logprobs(batch)
        (logprobs.sum() * 0.0).backward()  # type: ignore[no-untyped-call]

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
        inputs = self._inputs(sequences, old)
        loss, partial = self.loss(inputs, self.train, self.guidance, counts)
        loss.backward()  # type: ignore[no-untyped-call]
        return partial

    def _inputs(self, sequences: Sequence[TrainSequence], old: Sequence[Tensor] | None) -> LossInputs:
        batch = train_batch(sequences, pad_id=self.policy.pad_id, device=self.policy.device)
        stats = self.policy.statistics(batch)
        mask = batch.asked
        return LossInputs(
            logprobs=stats.logprobs,
            entropy=stats.entropy,
            old_logprobs=stats.logprobs.detach()
            if old is None
            else place_values([row.tolist() for row in old], mask),
            response_mask=mask,
            is_teacher=torch.tensor([s.is_teacher for s in sequences], device=mask.device),
            advantages=torch.tensor([[s.advantage] for s in sequences], device=mask.device),
            teacher_logprobs=place_values([s.teacher_logprobs for s in sequences], mask)
            if self.guidance.ratio == "teacher"
            else None,
            sampler_logprobs=self._sampler_logprobs(sequences, mask),
            reference_logprobs=self._reference_logprobs(batch),
        )

    def _sampler_logprobs(self, sequences: Sequence[TrainSequence], mask: Tensor) -> Tensor | None:
        """[B, L] of the student's tokens; None where its sampler did not tell them."""
        known = all(s.is_teacher or s.sampler_logprobs is not None for s in sequences)
        if not known:
            return None
        return place_values([s.sampler_logprobs for s in sequences], mask)

    @torch.no_grad()
    def _reference_logprobs(self, batch: TokenBatch) -> Tensor | None:
        return None if self.reference is None else self.reference.logprobs(batch)

    @torch.no_grad()
    def _old_logprobs(self, sequences: Sequence[TrainSequence]) -> list[Tensor]:
        """[R] for each sequence under the policy as it is now."""
        found: dict[int, Tensor] = {}
        lengths = [sequence.length for sequence in sequences]
        with gathered_weights(self.policy):
            for indices in fill(lengths, self.train.max_tokens_per_microbatch):
                batch = train_batch(
                    [sequences[i] for i in indices], pad_id=self.policy.pad_id, device=self.policy.device
                )
                logprobs = self.policy.logprobs(batch)
                found.update({i: logprobs[b][batch.asked[b]].cpu() for b, i in enumerate(indices)})
        return [found[i] for i in range(len(sequences))]


def member_advantages(groups: Sequence[Group], *, scale: str) -> Tensor:
    """[N, G] advantages of the groups as they train."""
    rewards = torch.tensor([[member.reward for member in group.members] for group in groups])
    return group_advantages(rewards, scale=scale)


def sequences_of(
    groups: Sequence[Group], advantages: Tensor, *, without_truncated: bool = False
) -> list[TrainSequence]:
    """The sequences of groups that carry a gradient; a group of equal rewards has none and is left out.

    `without_truncated`: the student's samples that were cut are left out, too; in the advantages they count.
    """
    return [
        TrainSequence(
            prompt_ids=group.prompt_ids,
            response_ids=member.token_ids,
            advantage=float(advantage),
            is_teacher=member.is_teacher,
            teacher_logprobs=member.logprobs if member.is_teacher else None,
            sampler_logprobs=None if member.is_teacher else member.logprobs or None,
        )
        for group, row in zip(groups, advantages, strict=True)
        if bool(row.any())
        for member, advantage in zip(group.members, row, strict=True)
        if not (without_truncated and member.finish_reason == "length")
    ]


def count_sequences(sequences: Sequence[TrainSequence], max_completion_length: int) -> StepCounts:
    """The counts that every micro-batch of an optimizer step divides by."""
    return count(
        torch.tensor([len(sequence.response_ids) for sequence in sequences]),
        torch.tensor([sequence.is_teacher for sequence in sequences]),
        max_length=max_completion_length,
    )


def _total(sums: Sequence[float | None], count: int) -> float | None:
    """The mean over `count`; None when any sum is unknown, or nothing was counted."""
    known = [each for each in sums if each is not None]
    return sum(known) / count if count and len(known) == len(sums) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that exist."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_report(reports: Sequence[UpdateReport]) -> UpdateReport:
    """What a sampling step's optimizer steps did, in one."""
    n = max(len(reports), 1)
    return UpdateReport(
        loss=sum(report.loss for report in reports) / n,
        grad_norm=sum(report.grad_norm for report in reports) / n,
        entropy=_mean([report.entropy for report in reports]),
        kl=_mean([report.kl for report in reports]),
        clip_low=_mean([report.clip_low for report in reports]),
        clip_high=_mean([report.clip_high for report in reports]),
        tokens=sum(report.tokens for report in reports),
        optimizer_steps=len(reports),
        sampler_difference=_mean([report.sampler_difference for report in reports]),
        sampler_capped=_mean([report.sampler_capped for report in reports]),
    )
