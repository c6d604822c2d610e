"""Sequences into micro-batches: sorted by length, filled to a token budget, padded.

Pure. How a step is cut changes memory and speed, never loss or gradient (see `objective`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PASS_TOKENS = 1024
"""What a forward pass costs beyond its tokens, in tokens: so much padding is worth one pass less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """One prompt and response that trains."""

    prompt_ids: tuple[int, ...]
    """[P]"""
    response_ids: tuple[int, ...]
    """[R], at least one token."""
    advantage: float
    is_teacher: bool
    teacher_logprobs: tuple[float, ...] | None = None
    """[R], for `ratio = "teacher"` alone."""
    sampler_logprobs: tuple[float, ...] | None = None
    """[R], a student sample's log-probabilities under the distribution that its sampler drew from."""

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Padded ids, and which of them are asked about."""

    input_ids: Tensor
    """[B, L]"""
    attention_mask: Tensor
    """[B, L] 1 on real tokens, 0 on padding."""
    asked: Tensor
    """[B, L] bool, true on the tokens whose log-probability is wanted (response, or gold answer)."""


def fill(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices cut into micro-batches: longest first, rows * longest <= max_tokens, and of all such cuts the
    one with the fewest tokens, padding included, where each micro-batch counts as PASS_TOKENS more.

    A sequence longer than the budget gets a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    # costs[n]: of the best cut of the n longest, whose last micro-batch begins at starts[n].
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


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Indices dealt out to `hands` processes, longest first, so that each gets as many long ones; a hand
    keeps the order of the indices."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [sorted(order[hand::hands]) for hand in range(hands)]


def pad(
    rows: Sequence[Sequence[int]],
    asked: Sequence[int],
    *,
    pad_id: int,
    device: torch.device,
    side: Literal["right", "left"] = "right",
) -> TokenBatch:
    """Padded ids; the last `asked[b]` tokens of row b are asked about.

    With padding on the right every row keeps its natural positions 0..L-1, and attention needs no mask.
    """
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    asked_mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for b, (row, last) in enumerate(zip(rows, asked, strict=True)):
        start = 0 if side == "right" else longest - len(row)
        end = start + len(row)
        input_ids[b, start:end] = torch.tensor(row, dtype=torch.long)
        attention_mask[b, start:end] = 1
        asked_mask[b, end - last : end] = True
    return TokenBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        asked=asked_mask.to(device),
    )


def place_values(values: Sequence[Sequence[float] | None], asked: Tensor) -> Tensor:
    """[B, L] float32 with each row's values on its asked tokens and 0 elsewhere; None leaves a row at 0.

    Raises ValueError when a row has another number of values than asked tokens.
    """
    placed = torch.zeros(asked.shape, dtype=torch.float32)
    mask = asked.cpu()
    for b, row in enumerate(values):
        if row is not None:
            if len(row) != int(mask[b].sum()):
                raise ValueError(f"row {b}: {len(row)} values for {int(mask[b].sum())} tokens")
            placed[b, mask[b]] = torch.tensor(row, dtype=torch.float32)
    return placed.to(asked.device)


def train_batch(
    sequences: Sequence[TrainSequence],
    *,
    pad_id: int,
    device: torch.device,
    side: Literal["right", "left"] = "right",
) -> TokenBatch:
    """Prompt and response of each sequence, the response asked about."""
    rows = [(*sequence.prompt_ids, *sequence.response_ids) for sequence in sequences]
    asked = [len(sequence.response_ids) for sequence in sequences]
    return pad(rows, asked, pad_id=pad_id, device=device, side=side)
