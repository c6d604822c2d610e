"""The update of a step: groups become sequences, mini-batches, micro-batches and optimizer steps.

groups --advantages--> sequences --counts--> weights --micro-batches--> gradient --clip--> optimizer step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.method.groups import Group
from trainer.method.loss import LossInputs, MicroLoss, StepCounts, Sums, group_advantages
from trainer.parallel.world import ALONE, World, full_tensor
from trainer.student.adapters import dropping_out
from trainer.student.batches import (
    TrainSequence,
    fill,
    response_values,
    split_over_ranks,
    to_device,
    train_batch,
)
from trainer.student.policy import Policy

IDLE = TrainSequence(prompt_ids=(0, 0), response_ids=(), advantage=0.0, is_teacher=True)
"""Micro-batch of a rank that has fewer of them than another: it adds nothing, but all ranks gather weights
and sum gradients at once and in one order."""


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite; the optimizer step was not taken, the weights are
    unchanged."""

    def __init__(self, message: str, sequences: Sequence[TrainSequence]) -> None:
        super().__init__(f"{message}: not finite; this optimizer step was not taken")
        self.sequences = tuple(sequences)
        """The micro-batch with the loss, or the optimizer step with the gradient."""


@dataclass(slots=True, eq=False)
class Updater:
    """Turns groups into optimizer steps."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    train: TrainConfig
    loss: MicroLoss
    max_completion_length: int
    reference: Callable[..., Tensor] | None = None
    """`logprobs` of the student before training, for the KL term."""
    supervised: bool = False
    """True if the guided loss needs no advantage, so that the traces of every group train."""
    world: World = ALONE

    def update(
        self,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float]],
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> dict[str, float]:
        """Takes one optimizer step for each mini-batch of `mini_batch_problems` groups; returns the metrics.

        Args:
            groups: the whole step's, on every rank, as `advantages` of their members.
            weights: of guided and of student tokens.
        """
        size, supervised = self.train.mini_batch_problems, self.supervised
        masked = self.train.mask_truncated_completions
        batches = [
            sequences_of(
                groups[i : i + size],
                advantages[i : i + size],
                without_truncated=masked,
                supervised=supervised,
            )
            for i in range(0, len(groups), size)
        ]
        steps = [(batch, cut) for batch in batches if (cut := self.micro_batches(batch))]
        # The first optimizer step updates the policy that sampled: its old log-probs are its own.
        steps = [*steps[:1], *((batch, self._with_old_logprobs(cut)) for batch, cut in steps[1:])]
        return mean_metrics([self.optimizer_step(batch, cut, weights) for batch, cut in steps])

    def micro_batches(self, sequences: Sequence[TrainSequence]) -> list[list[TrainSequence]]:
        """Returns this rank's share of the sequences that carry a gradient, cut into micro-batches: as many
        as the rank with the most has. Empty where no sequence carries one."""
        regularised = bool(self.train.entropy_coef or self.reference)
        trained = [
            s
            for s in sequences
            if s.advantage != 0
            or (self.supervised and s.guided_tokens)
            or (regularised and s.guided_tokens < len(s.response_ids))
        ]
        cuts = []
        for indices in split_over_ranks([s.length for s in trained], self.world.size):
            share = [trained[i] for i in indices]
            parts = fill([s.length for s in share], self.train.max_tokens_per_microbatch)
            cuts.append([[share[i] for i in part] for part in parts])
        own = cuts[self.world.rank]
        return own + [[IDLE]] * (max(map(len, cuts)) - len(own))

    def optimizer_step(
        self,
        sequences: Sequence[TrainSequence],
        micro_batches: Sequence[Sequence[TrainSequence]] | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> dict[str, float]:
        """Takes one optimizer step; returns its metrics. The counts of `sequences`, the whole optimizer
        step's, are the denominators; `micro_batches` are this rank's, None: cut from `sequences`; `weights`
        as in `update`."""
        counts = count(sequences, self.max_completion_length)
        counts = replace(counts, guided_weight=weights[0], student_weight=weights[1])
        self.optimizer.zero_grad(set_to_none=True)
        with dropping_out(self.policy.model):
            own = micro_batches or self.micro_batches(sequences)
            found = [self._backward(each, counts) for each in own]
        trained = [weight for weight in self.policy.model.parameters() if weight.requires_grad]
        norm = full_tensor(torch.nn.utils.get_total_norm([w.grad for w in trained if w.grad is not None]))
        metrics = self._metrics(own, found, norm)
        if not math.isfinite(metrics["grad_norm"]):
            message = "gradient norm {grad_norm} at a loss of {loss:.4g}".format(**metrics)
            raise NonFiniteError(message, sequences)
        torch.nn.utils.clip_grads_with_norm_(trained, self.train.max_grad_norm, norm)
        self.optimizer.step()
        # Freed now, since sampling needs no gradients.
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _backward(self, sequences: Sequence[TrainSequence], counts: StepCounts) -> tuple[Tensor, Sums]:
        """Adds a micro-batch's gradient to the weights'; returns its loss and metrics, on the device."""
        loss, sums = self.loss(self._inputs(sequences), counts)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), sums

    def _metrics(
        self,
        micro_batches: Sequence[Sequence[TrainSequence]],
        found: Sequence[tuple[Tensor, Sums]],
        norm: Tensor,
    ) -> dict[str, float]:
        """Returns the optimizer step's metrics over all ranks, from one copy off the device: a copy for each
        micro-batch would keep the device waiting. Raises NonFiniteError for a loss."""
        scalars = [norm]
        for loss, sums in found:
            scalars += [loss, *(each for pair in sums.values() for each in pair)]
        values = iter(torch.stack([scalar.float() for scalar in scalars]).tolist())
        grad_norm, mine = next(values), []
        for sequences, (_, sums) in zip(micro_batches, found, strict=True):
            value, copied = next(values), {name: (next(values), next(values)) for name in sums}
            failed = None if math.isfinite(value) else sequences
            mine.append((value, copied, sum(len(s.response_ids) for s in sequences), failed))
        parts = [part for share in self.world.gather(mine) for part in share]
        totals: dict[str, tuple[float, float]] = {}
        for value, copied, _, failed in parts:
            if failed is not None:
                raise NonFiniteError(f"loss {value} of a micro-batch", failed)
            for name, (total, n) in copied.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = before[0] + total, before[1] + n
        means = {name: total / n for name, (total, n) in totals.items() if n}
        loss, tokens = sum(part[0] for part in parts), sum(part[2] for part in parts)
        return {"loss": loss, "grad_norm": grad_norm} | means | {"train_tokens": tokens}

    def _inputs(self, sequences: Sequence[TrainSequence]) -> LossInputs:
        device = self.policy.device
        batch = train_batch(sequences, pad_id=self.policy.pad_id, device=device)
        known = partial(response_values, batch, sequences)
        logprobs, entropy = self.policy.logprobs_and_entropy(batch)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(batch)
        old_known = any(s.old_logprobs is not None for s in sequences)
        sampler_known = all(s.is_teacher or s.sampler_logprobs is not None for s in sequences)
        return LossInputs(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=known([s.old_logprobs for s in sequences]) if old_known else logprobs.detach(),
            response_mask=batch.target_mask,
            is_teacher=to_device(torch.tensor([s.is_teacher for s in sequences]), device),
            guided_mask=self._guided_mask(sequences, batch.target_mask),
            advantages=to_device(torch.tensor([[s.advantage] for s in sequences]), device),
            teacher_logprobs=known([s.teacher_logprobs for s in sequences]),
            sampler_logprobs=known([s.sampler_logprobs for s in sequences]) if sampler_known else None,
            reference_logprobs=reference,
        )

    def _guided_mask(self, sequences: Sequence[TrainSequence], mask: Tensor) -> Tensor | None:
        """Returns the tokens that a teacher wrote; None where it wrote whole responses or none."""
        if not any(s.n_guided for s in sequences):
            return None
        guided = to_device(torch.tensor([[s.guided_tokens] for s in sequences]), self.policy.device)
        return mask & (mask.cumsum(dim=1) <= guided)

    def _with_old_logprobs(self, micro_batches: list[list[TrainSequence]]) -> list[list[TrainSequence]]:
        """Returns the micro-batches with log-probabilities under the policy as it is now."""
        pad_id, device = self.policy.pad_id, self.policy.device
        with self.policy.gathered():
            values = self.policy.response_logprobs(
                train_batch(sequences, pad_id=pad_id, device=device) for sequences in micro_batches
            )
        return [
            [replace(s, old_logprobs=tuple(islice(values, len(s.response_ids)))) for s in sequences]
            for sequences in micro_batches
        ]


def member_advantages(groups: Sequence[Group], *, scale: str, baseline: str = "members") -> list[list[float]]:
    """Returns the advantages of each group's members; `baseline` as `guidance.baseline`."""
    found = []
    for group in groups:
        rewards = torch.tensor([[member.reward for member in group.members]])
        own = torch.tensor([[sample.reward for sample in group.samples]]) if baseline == "student" else None
        found.append(group_advantages(rewards, scale=scale, baseline=own)[0].tolist())
    return found


def sequences_of(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float]],
    *,
    without_truncated: bool = False,
    supervised: bool = False,
) -> list[TrainSequence]:
    """Returns the sequences of groups that carry a gradient; a group of equal rewards is left out.

    Args:
        without_truncated: the student's samples that were cut are left out, too; their rewards still count in
            the advantages.
        supervised: the traces of groups that are left out stay.
    """
    return [
        TrainSequence(
            prompt_ids=member.prompt_ids or group.prompt.ids,
            response_ids=member.token_ids,
            advantage=advantage,
            is_teacher=member.is_teacher,
            n_guided=member.n_guided or 0,
            teacher_logprobs=member.logprobs if member.is_teacher else None,
            sampler_logprobs=None if member.is_teacher else member.logprobs or None,
        )
        for group, row in zip(groups, advantages, strict=True)
        for member, advantage in zip(group.members, row, strict=True)
        if (any(row) or (supervised and member.is_teacher))
        and not (without_truncated and member.finish_reason == "length")
    ]


def count(sequences: Sequence[TrainSequence], max_completion_length: int) -> StepCounts:
    """Returns the counts that every micro-batch of an optimizer step divides by."""
    student = [s for s in sequences if not s.is_teacher]
    return StepCounts(
        sequences=len(sequences),
        student_sequences=len(student),
        student_tokens=sum(len(s.response_ids) - s.guided_tokens for s in student),
        guided_tokens=sum(s.guided_tokens for s in sequences),
        max_length=max_completion_length,
    )


def mean_metrics(steps: Iterable[dict[str, float]]) -> dict[str, float]:
    """Returns the mean over the optimizer steps that have the metric; `train_tokens` is their sum."""
    rows = list(steps)
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if name in row] for name in names}
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return means | {"train_tokens": sum(found.get("train_tokens", [])), "optimizer_steps": len(rows)}
