"""Samples that depend on a row's seed alone, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from precompute.engines import Sampling

BLOCK = 512
"""Tokens of a block, whose bins are searched once the block is found."""
FEW_BLOCKS = 8
"""Up to this many blocks all tokens are searched at once."""


class SeededSampler(LogitsProcessor):
    """Samples the next token of each row by inverse CDF at the row's own uniform, and forces it.

    Keeps the log-probability of each token, of the kind that `Sampling.logprobs` names.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        # Uniforms in float32 would miss bins that are narrower than they resolve; MPS has nothing wider.
        self._precision = torch.float32 if device.type == "mps" else torch.float64
        self._uniforms = uniforms(seeds, sampling.max_tokens).to(device, self._precision)  # [B, max_tokens]
        self.max_tokens = sampling.max_tokens
        self.logprobs = torch.zeros(len(seeds), sampling.max_tokens, device=device)
        """[B, max_tokens]; values after a row's end are meaningless."""
        self.counts = [0] * len(seeds)
        """[B], number of tokens of each row so far; rows that joined later have fewer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, L] and raw logits [B, V] -> [B, V] with everything but the sampled token at -inf."""
        columns = torch.tensor(self.counts, device=scores.device)[:, None]  # [B, 1]
        tokens, logprobs = self._sample(scores, self._uniforms.gather(1, columns))
        self.logprobs.scatter_(1, columns, logprobs.float())
        self.counts = [count + 1 for count in self.counts]
        return scores.fill_(-torch.inf).scatter_(1, tokens, 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows of the batch."""
        index = torch.tensor(rows, dtype=torch.long, device=self._uniforms.device)
        self._uniforms, self.logprobs = self._uniforms[index], self.logprobs[index]
        self.counts = [self.counts[row] for row in rows]

    def join(self, others: SeededSampler) -> None:
        """Appends the rows of `others`."""
        self._uniforms = torch.cat([self._uniforms, others._uniforms])
        self.logprobs = torch.cat([self.logprobs, others.logprobs])
        self.counts += others.counts

    def _sample(self, logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, V] and the rows' next uniforms [B, 1] -> tokens [B, 1] and their log-probabilities"""
        sampling = self._sampling
        if sampling.temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
            return tokens, log_softmax_at(logits, tokens)
        tempered = logits if sampling.temperature == 1 else logits / sampling.temperature
        normalizer = tempered.logsumexp(-1, keepdim=True)  # [B, 1]
        probs = (tempered - normalizer).exp_()
        if sampling.top_k:
            probs = keep_top_k(probs, sampling.top_k)
        if sampling.top_p < 1:
            probs = keep_top_p(probs, sampling.top_p)
        tokens = inverse_cdf(probs, uniform)
        if sampling.logprobs == "model" and sampling.temperature != 1:
            return tokens, log_softmax_at(logits, tokens)
        logprobs = tempered.gather(1, tokens) - normalizer
        if sampling.logprobs == "sampler" and not sampling.is_plain:
            logprobs -= probs.sum(-1, keepdim=True).log()  # the mass that top_k and top_p left
        return tokens, logprobs


def log_softmax_at(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] and token ids [B, 1] -> log-probabilities [B, 1]"""
    return logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """Returns [B, count] in [0, 1), float64, on the CPU; row i depends on seeds[i] alone."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows)


def inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, V] (of any positive sum) and uniforms [B, 1] in [0, 1) -> token ids [B, 1].

    A token of probability 0 is never sampled: its bin is empty. Over a large vocabulary the block is found
    first, then the token in it: one pass over V, and no float64 tensor of that size.
    """
    if probs.shape[1] <= FEW_BLOCKS * BLOCK:
        return _bin(probs.to(uniform.dtype), uniform)[0]
    # A block's sum in float32 is as exact as the probabilities themselves.
    whole = probs.shape[1] // BLOCK
    sums = probs[:, : whole * BLOCK].view(len(probs), whole, BLOCK).sum(-1)
    rest = probs[:, whole * BLOCK :].sum(-1, keepdim=True)
    block, within = _bin(torch.cat([sums, rest], dim=1).to(uniform.dtype), uniform)
    columns = block * BLOCK + torch.arange(BLOCK, device=probs.device)  # [B, BLOCK]
    last = probs.shape[1] - 1
    weights = probs.gather(1, columns.clamp(max=last)).masked_fill_(columns > last, 0.0)
    return columns.gather(1, _bin(weights.to(uniform.dtype), within)[0]).clamp_(max=last)


def _bin(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [B, N] and uniforms [B, 1] in [0, 1) -> the uniform's bin, and the share of that bin below the
    uniform, in [0, 1); both [B, 1]."""
    edges = weights.cumsum(-1)
    position = uniform * edges[:, -1:]
    bins = torch.searchsorted(edges, position, right=True)
    bins.clamp_(max=weights.shape[1] - 1)  # only NaN is beyond the last bin
    weight = weights.gather(1, bins)
    share = (position - (edges.gather(1, bins) - weight)) / weight
    return bins, share.clamp_(0, 1 - torch.finfo(share.dtype).eps)


def keep_top_k(probs: torch.Tensor, k: int) -> torch.Tensor:
    """Returns [B, V] with all but the k most probable tokens of a row at 0 (ties with the k-th stay)."""
    least = probs.topk(min(k, probs.shape[1])).values[:, -1:]
    return probs.masked_fill(probs < least, 0.0)


def keep_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Returns [B, V] with a row's least probable tokens at 0; the fewest that sum to a share p stay."""
    descending, order = probs.sort(dim=-1, descending=True, stable=True)
    before = descending.cumsum(-1) - descending
    dropped = before >= p * descending.sum(-1, keepdim=True)
    return probs.masked_fill(dropped.scatter(1, order, dropped), 0.0)
