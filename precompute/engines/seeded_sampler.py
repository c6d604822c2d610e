"""Draws that depend on a row's seed alone, whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from precompute.engines import Sampling

BLOCK = 512
"""Tokens whose bins are looked through one by one, once it is known that the draw lies among them."""
FEW_BLOCKS = 8
"""Up to so many, all tokens are looked through at once."""


class SeededSampler(LogitsProcessor):
    """Draws the next token of each row by inverse CDF at the row's own uniform, and forces it.

    Remembers the log-probability of each token, of the kind that the sampling asks for.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        # Uniforms in float32 would miss bins that are narrower than they resolve; MPS has nothing wider.
        self._precision = torch.float32 if device.type == "mps" else torch.float64
        self._uniforms = uniforms(seeds, sampling.max_tokens).to(device, self._precision)  # [B, max_tokens]
        self.max_tokens = sampling.max_tokens
        self.logprobs = torch.zeros(len(seeds), sampling.max_tokens, device=device)
        """[B, max_tokens]; what stands behind a row's end means nothing."""
        self.drawn = [0] * len(seeds)
        """[B], the tokens drawn so far for each row; rows that joined later have fewer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, L] and raw logits [B, V] -> [B, V] with everything but the drawn token at -inf."""
        columns = torch.tensor(self.drawn, device=scores.device)[:, None]  # [B, 1]
        tokens, logprobs = self._draw(scores, self._uniforms.gather(1, columns))
        self.logprobs.scatter_(1, columns, logprobs.float())
        self.drawn = [count + 1 for count in self.drawn]
        return scores.fill_(-torch.inf).scatter_(1, tokens, 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch alone."""
        index = torch.tensor(rows, dtype=torch.long, device=self._uniforms.device)
        self._uniforms, self.logprobs = self._uniforms[index], self.logprobs[index]
        self.drawn = [self.drawn[row] for row in rows]

    def join(self, others: SeededSampler) -> None:
        """Draws for the rows of `others` too, below these."""
        self._uniforms = torch.cat([self._uniforms, others._uniforms])
        self.logprobs = torch.cat([self.logprobs, others.logprobs])
        self.drawn += others.drawn

    def _draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
            logprobs -= probs.sum(-1, keepdim=True).log()  # what top_k and top_p have left of 1
        return tokens, logprobs


def log_softmax_at(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] and token ids [B, 1] -> log-probabilities [B, 1]"""
    return logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """[B, count] in [0, 1), float64: row i depends on seeds[i] alone, on the CPU wherever the model is."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(rows)


def inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, V] (of any positive sum) and uniforms [B, 1] in [0, 1) -> token ids [B, 1].

    A token of probability 0 is never drawn: its bin is empty. Over a large vocabulary the bin of a block of
    tokens is found first, then the token's within it: one pass over V, and nothing wide of that size.
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
    """Weights [B, N] and uniforms [B, 1] in [0, 1) -> the bin that the uniform lands in, and the share of
    that bin which lies before it, in [0, 1); both [B, 1]."""
    edges = weights.cumsum(-1)
    place = uniform * edges[:, -1:]
    bins = torch.searchsorted(edges, place, right=True)
    bins.clamp_(max=weights.shape[1] - 1)  # only NaN lands behind the last bin
    weight = weights.gather(1, bins)
    share = (place - (edges.gather(1, bins) - weight)) / weight
    return bins, share.clamp_(0, 1 - torch.finfo(share.dtype).eps)


def keep_top_k(probs: torch.Tensor, k: int) -> torch.Tensor:
    """[B, V] with all but the k most probable tokens of a row at 0 (ties with the k-th stay)."""
    least = probs.topk(min(k, probs.shape[1])).values[:, -1:]
    return probs.masked_fill(probs < least, 0.0)


def keep_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """[B, V] with a row's least probable tokens at 0: those kept are the fewest that hold a share p."""
    descending, order = probs.sort(dim=-1, descending=True, stable=True)
    before = descending.cumsum(-1) - descending
    dropped = before >= p * descending.sum(-1, keepdim=True)
    return probs.masked_fill(dropped.scatter(1, order, dropped), 0.0)
