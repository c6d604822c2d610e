"""Rows of a running batch: left-padded ids and their key-value cache; rows join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from precompute.engines import Request, Sampling
from precompute.engines.seeded_sampler import SeededSampler


class Rows:
    """Requests that are sampled together.

    `ids` and `mask` are [B, L] and grow on the right. The cache has all columns but the last. It is None for
    a model with another kind of state: such rows can leave, and no others can join.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        pad_id: int,
        cache: Any,
        device: torch.device,
    ) -> None:
        self.requests = list(requests)
        self.cache = cache
        self.sampler = SeededSampler([request.seed for request in requests], sampling, device)
        ids, mask = left_padded([request.prompt_ids for request in requests], pad_id=pad_id)
        self.ids, self.mask = ids.to(device), mask.to(device)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def can_be_joined(self) -> bool:
        """True if every layer keeps all columns, or the last ones: then rows of another length can join."""
        return self.cache is not None and all(
            type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in self.cache.layers
        )

    def grow(self, ids: torch.Tensor) -> None:
        """Sets the ids [B, L + n] after n further tokens."""
        self.mask = torch.nn.functional.pad(self.mask, (0, ids.shape[1] - self.mask.shape[1]), value=1)
        self.ids = ids

    def sampled(self) -> list[tuple[list[int], list[float]]]:
        """Returns [B], each row's tokens and log-probabilities so far, padding after its end included."""
        counts = self.sampler.counts
        tokens = self.ids[:, self.ids.shape[1] - max(counts) :].tolist()
        logprobs = self.sampler.logprobs[:, : max(counts)].tolist()
        return [
            (row[len(row) - count :], values[:count])
            for row, values, count in zip(tokens, logprobs, counts, strict=True)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, and the columns that pad all of these."""
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        self.requests = [self.requests[row] for row in rows]
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.sampler.keep(rows)
        if self.cache is None:
            return
        self.cache.batch_select_indices(index)
        if rows and self.can_be_joined:
            self._cut_padding(int(self.mask.argmax(-1).min()))

    def join(self, others: Rows) -> None:
        """Appends rows that have one token each."""
        if not others.requests:
            return
        width = max(self.ids.shape[1], others.ids.shape[1])
        self.ids = torch.cat([_widened(self.ids, width, 1), _widened(others.ids, width, 1)])
        self.mask = torch.cat([_widened(self.mask, width, 1), _widened(others.mask, width, 1)])
        self.requests += others.requests
        self.sampler.join(others.sampler)
        for ours, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            kept = _kept(ours, width - 1)
            keys = torch.cat([_widened(layer.keys, kept, 2) for layer in (ours, theirs)])
            values = torch.cat([_widened(layer.values, kept, 2) for layer in (ours, theirs)])
            _hold(ours, keys, values, width - 1)

    def _cut_padding(self, columns: int) -> None:
        if not columns:
            return
        self.ids, self.mask = self.ids[:, columns:], self.mask[:, columns:]
        left = self.ids.shape[1] - 1
        for layer in self.cache.layers:
            cut = layer.keys.shape[2] - _kept(layer, left)
            # A copy: a view would keep the cut columns in memory.
            _hold(layer, layer.keys[:, :, cut:].clone(), layer.values[:, :, cut:].clone(), left)


def _kept(layer: DynamicLayer, columns: int) -> int:
    """Returns how many of `columns` columns a layer keeps: all, or the last ones in its window."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(columns, int(layer.sliding_window) - 1)
    return columns


def _hold(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor, columns: int) -> None:
    """Sets a layer's keys and values, which it keeps of `columns` columns."""
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = columns


def left_padded(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and attention mask, both [B, P]; padding is on the left, for `generate` appends."""
    width = max(len(row) for row in rows)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _widened(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Pads `dim` with zeros on the left, up to `width` columns."""
    shape = list(tensor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
