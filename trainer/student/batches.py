"""Sequences into micro-batches: sorted by length, filled to a token budget, padded on the right.

Pure. The cut changes memory and speed, never loss or gradient (see `method.loss`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PASS_TOKENS = 1024
"""Cost of a forward pass beyond its tokens, in tokens: one pass less is worth this much padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One prompt and response that trains."""

    prompt_ids: tuple[int, ...]
    """[P]"""
    response_ids: tuple[int, ...]
    """[R]"""
    advantage: float
    is_teacher: bool
    n_guided: int = 0
    """Leading response tokens that a teacher wrote, if it did not write all."""
    teacher_logprobs: tuple[float, ...] | None = None
    """[R], for the guided losses `shaped_ratio` and `self_kl` alone."""
    sampler_logprobs: tuple[float, ...] | None = None
    """[R], a student sample's log-probabilities under the distribution that its engine sampled from."""
    old_logprobs: tuple[float, ...] | None = None
    """[R] under the policy that sampled; None: the current policy is that policy."""

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def guided_tokens(self) -> int:
        return len(self.response_ids) if self.is_teacher else self.n_guided


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Token ids padded on the right, and the tokens whose log-probability is wanted."""

    input_ids: Tensor
    """[B, L]"""
    target_mask: Tensor
    """[B, L] bool, true on the response or on the gold answer; false in column 0."""
    targets: Tensor
    """[N] indices of the target tokens in the flattened [B * L], ascending."""

    def scatter(self, values: Tensor) -> Tensor:
        """Returns [B, L] with `values` [N] at the target tokens and 0 elsewhere."""
        zeros = values.new_zeros(self.target_mask.numel())
        return zeros.scatter(0, self.targets, values).view(self.target_mask.shape)


def fill(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Returns indices cut into micro-batches: longest first, rows * longest <= max_tokens, and of all such
    cuts the one with the fewest tokens, padding included, where each micro-batch counts as PASS_TOKENS more.

    A sequence longer than the budget gets a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    # costs[n]: cost of the best cut of the n longest, whose last micro-batch begins at starts[n].
    costs, starts = [0, *[sys.maxsize] * len(order)], [0] * (len(order) + 1)
    for start, index in enumerate(order):
        rows = max(1, max_tokens // lengths[index])
        for end in range(start + 1, min(start + rows, len(order)) + 1):
            cost = costs[start] + (end - start) * lengths[index] + PASS_TOKENS
            if cost < costs[end]:
                costs[end], starts[end] = cost, start
    batches, end = [], len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def split_over_ranks(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Returns each rank's indices, in ascending order: longest first in turn, so that each rank gets equally
    many long sequences."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [sorted(order[rank::ranks]) for rank in range(ranks)]


def pad(
    rows: Sequence[Sequence[int]], targets: Sequence[int], *, pad_id: int, device: torch.device
) -> TokenBatch:
    """Pads rows of ids on the right; the last `targets[b]` tokens of row b are its target tokens."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    target_mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for b, (row, last) in enumerate(zip(rows, targets, strict=True)):
        input_ids[b, : len(row)] = torch.tensor(row, dtype=torch.long)
        target_mask[b, len(row) - last : len(row)] = True
    return token_batch(input_ids, target_mask, device=device)


def token_batch(input_ids: Tensor, target_mask: Tensor, *, device: torch.device) -> TokenBatch:
    """Returns the batch on the device; ids and mask are on the host, where their indices cost no waiting."""
    targets = target_mask.flatten().nonzero().flatten()
    ids, mask, targets = (to_device(each, device) for each in (input_ids, target_mask, targets))
    return TokenBatch(input_ids=ids, target_mask=mask, targets=targets)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host; to CUDA without waiting for the work that is queued there."""
    on_cuda = device.type == "cuda"
    return (values.pin_memory() if on_cuda else values).to(device, non_blocking=on_cuda)


def train_batch(sequences: Sequence[TrainSequence], *, pad_id: int, device: torch.device) -> TokenBatch:
    """Returns prompt and response of each sequence, with the response as target tokens."""
    rows = [(*sequence.prompt_ids, *sequence.response_ids) for sequence in sequences]
    targets = [len(sequence.response_ids) for sequence in sequences]
    return pad(rows, targets, pad_id=pad_id, device=device)


def response_values(
    batch: TokenBatch, sequences: Sequence[TrainSequence], values: Sequence[Sequence[float] | None]
) -> Tensor:
    """Returns [B, L] float32 with each sequence's values on its response and 0 elsewhere; None is all 0."""
    rows = [row or (0.0,) * len(s.response_ids) for s, row in zip(sequences, values, strict=True)]
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    return batch.scatter(to_device(flat, batch.targets.device))
