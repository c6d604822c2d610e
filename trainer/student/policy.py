"""The student: loading it, and the log-probabilities of tokens under it.

`[B, L, V]` logits never exist: hidden states are computed for all positions, logits only for the tokens that
are asked about, a chunk of tokens at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from precompute.engines.checks import eos_ids
from precompute.problems.prompts import turn_end
from trainer.method.objective import log_softmax_and_entropy, selective_log_softmax
from trainer.student.batches import TokenBatch
from trainer.student.head import head_logits

LOGITS_PER_CHUNK = 2**27
"""Logits that exist at once; 512 MiB in float32, 880 tokens of a vocabulary of 152,000."""


OfLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(logits [N, V], targets [N]) -> values, each [N]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What the policy says of the asked tokens; 0 elsewhere."""

    logprobs: Tensor
    """[B, L] float32: column t is the log-probability of token t."""
    entropy: Tensor
    """[B, L] float32, in nats, of the distribution that token t was drawn from."""


class Reference(Protocol):
    """The student as it was before training, for the KL term."""

    def logprobs(self, batch: TokenBatch) -> Tensor: ...


class Policy:
    """A causal language model whose tokens' log-probabilities can be asked for."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        temperature: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        """`device`: where it will compute; None: where its weights are."""
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        """The transformers model itself, adapters in place."""
        self.body: Any = self.causal.base_model
        """Gives the hidden states that the head reads."""
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.temperature = temperature
        self.device: torch.device = device or next(model.parameters()).device
        self.has_tensor_cores = self.device.type == "cuda" and dtype == torch.bfloat16
        """For its head, whose hidden states have 7 bits then."""
        self.eos_ids = eos_ids(self.causal.generation_config, tokenizer)
        self.eos_id: int = turn_end(tokenizer, self.eos_ids)
        """Ends a trace in the student's tokens; `eos_ids` are all that end a response."""
        # Padding is masked wherever it stands, so any id will do.
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.asked_tokens: Callable[[TokenBatch, OfLogits], list[Tensor]] = self._asked_tokens
        """What OfLogits makes of the asked tokens' logits, each [N]."""
        self.shards: list[Any] = []
        """FSDP's modules, where the weights are dealt out over processes (sharding.py)."""
        self.is_gathered = False
        """Whether all of them are here nevertheless, for a while."""

    def compile(self) -> None:
        """From here on the body runs compiled, by one program for all lengths; sampling stays as it is."""
        self.body = torch.compile(self.causal.base_model, dynamic=True)

    def computing(self) -> AbstractContextManager[Any]:
        """Forward passes inside compute in the policy's dtype; the weights stay float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Another temperature than the sampling policy's for the block, backward passes included."""
        before, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = before

    def statistics(self, batch: TokenBatch) -> TokenStatistics:
        """Log-probability and entropy of every asked token, at the sampling temperature.

        Differentiable unless called under `torch.no_grad()`.
        """
        logprobs, entropy = self._of_asked(batch, log_softmax_and_entropy)
        return TokenStatistics(logprobs=logprobs, entropy=entropy)

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """[B, L] float32, the log-probabilities alone: what the entropy would cost is saved."""
        return self._of_asked(batch, lambda logits, targets: (selective_log_softmax(logits, targets),))[0]

    def _of_asked(self, batch: TokenBatch, of: OfLogits) -> list[Tensor]:
        """What `of` makes of the asked tokens' logits, each [B, L] with 0 elsewhere."""
        return [_placed(values, batch.asked) for values in self.asked_tokens(batch, of)]

    def _asked_tokens(self, batch: TokenBatch, of: OfLogits) -> list[Tensor]:
        with self.computing():
            hidden = self._hidden(batch)[:, :-1][batch.asked[:, 1:]]
        targets = batch.input_ids[:, 1:][batch.asked[:, 1:]]
        return self._over_chunks(hidden, targets, of)

    def _hidden(self, batch: TokenBatch) -> Tensor:
        """[B, L, H], what the output head reads."""
        # Nothing looks at what stands behind it, so padding on the right needs no mask: attention has kernels
        # for that case which keep no [L, L] matrix.
        padded_left = not bool(batch.attention_mask[:, 0].all())
        output = self.body(
            input_ids=batch.input_ids, use_cache=False, **(_left_padded(batch) if padded_left else {})
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _over_chunks(self, hidden: Tensor, targets: Tensor, of: OfLogits) -> list[Tensor]:
        """hidden [N, H], targets [N] -> what `of` gives, each [N]."""
        head = self.causal.get_output_embeddings()
        rows = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
        parts = []
        for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            # Recomputing a chunk's logits in the backward pass is what keeps them from piling up.
            recompute = torch.is_grad_enabled() and len(hidden) > rows
            part = (self._chunk, of, h, t, head.weight, head.bias)
            parts.append(checkpoint(*part, use_reentrant=False) if recompute else self._chunk(*part[1:]))
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _chunk(
        self, of: OfLogits, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        # In float32 whatever the body computes in: bfloat16 logits are 0.125 apart, near scores would tie.
        with torch.autocast(self.device.type, enabled=False):
            logits = head_logits(hidden, weight, bias, tensor_cores=self.has_tensor_cores)
        softcap = getattr(self.causal.config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        # At 1 the division would only copy.
        return of(logits if self.temperature == 1 else logits / self.temperature, targets)


class WithoutAdapters:
    """The frozen model under a policy's adapters: a reference that takes no memory of its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """As Policy.logprobs."""
        with self.policy.model.disable_adapter():
            return self.policy.logprobs(batch)


def _left_padded(batch: TokenBatch) -> dict[str, Tensor]:
    """What a model has to be told where rows begin with padding."""
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"attention_mask": batch.attention_mask, "position_ids": positions}


def _placed(values: Tensor, asked: Tensor) -> Tensor:
    """[N] values onto the true places of [B, L], zeros elsewhere."""
    return torch.zeros(asked.shape, dtype=values.dtype, device=values.device).masked_scatter(asked, values)
