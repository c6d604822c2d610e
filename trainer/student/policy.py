"""The student's forward pass: log-probability and entropy of the target tokens.

Hidden states are computed for all positions, logits for the target tokens alone, and for a slice of the
vocabulary at a time (`head.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from precompute.engines.checks import eos_ids
from precompute.problems.prompts import turn_end
from trainer.student.batches import TokenBatch
from trainer.student.head import LogitScale, target_values


class Policy:
    """A causal language model and its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        temperature: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            dtype: type that the model computes in; the head computes in float32.
            temperature: the sampling temperature, which all log-probabilities refer to.
            device: device that will compute; None: the one that holds the weights.
        """
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        """The transformers model, with adapters in place."""
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.temperature = temperature
        self.device: torch.device = device or next(model.parameters()).device
        self.has_tensor_cores = self.device.type == "cuda" and dtype == torch.bfloat16
        """True where the head may use TF32: bfloat16 hidden states have fewer bits anyway."""
        self.eos_ids = eos_ids(self.causal.generation_config, tokenizer)
        """All ids that end a response."""
        self.eos_id: int = turn_end(tokenizer, self.eos_ids)
        """The id that ends a trace in the student's tokens."""
        # Padding is on the right, where no token attends to it, so any id of the embedding will do.
        pad_id, embedded = tokenizer.pad_token_id, self.causal.config.get_text_config().vocab_size
        self.pad_id: int = pad_id if pad_id is not None and 0 <= pad_id < embedded else self.eos_id
        self.target_values: Callable[..., list[Tensor]] = self._target_values
        """`_target_values`, or FSDP's wrapper of it, which gathers the weights."""
        self.gathered: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Context in which every rank holds all weights and computes at its own pace."""
        self.shards: list[Any] = []
        """FSDP's modules, where the weights are sharded over ranks (parallel/fsdp.py)."""
        self.is_gathered = False
        """True inside `gathered`, where the weights are sharded."""

    def computing(self) -> AbstractContextManager[Any]:
        """Forward passes in the block compute in the policy's dtype; the weights stay float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Sets another temperature for the block, backward passes included."""
        before, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = before

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Returns [B, L] float32: log-probability of each target token, 0 elsewhere; skips the entropy."""
        return self.target_values(batch)[0]

    @torch.no_grad()
    def response_logprobs(self, batches: Iterable[TokenBatch]) -> Iterator[float]:
        """Returns the log-probability of each target token, row by row; one copy off the device for all."""
        empty = torch.empty(0, device=self.device)
        found = [self.logprobs(batch).flatten().index_select(0, batch.targets) for batch in batches]
        return iter(torch.cat([empty, *found]).tolist())

    def frozen_logprobs(self, batch: TokenBatch) -> Tensor:
        """Returns the `logprobs` of the model under the adapters: the student before training."""
        with self.model.disable_adapter():
            return self.logprobs(batch)

    def logprobs_and_entropy(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Returns [B, L] float32 twice, 0 outside the target tokens: column t holds the log-probability of
        token t, and the entropy in nats of the distribution that token t was sampled from.

        Differentiable unless called under `torch.no_grad()`.
        """
        logprobs, entropy = self.target_values(batch, entropy=True)
        return logprobs, entropy

    def _target_values(self, batch: TokenBatch, *, entropy: bool = False) -> list[Tensor]:
        """Returns what `head.target_values` finds of the target tokens, each as [B, L]."""
        with self.computing():
            # No attention mask: padding on the right changes nothing before it, and attention has kernels
            # for plain causal masks which keep no [L, L] matrix.
            output = self.causal.base_model(input_ids=batch.input_ids, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1).index_select(0, batch.targets - 1)  # [N, H]
        targets = batch.input_ids.flatten().index_select(0, batch.targets)  # [N]
        scale = LogitScale(
            temperature=self.temperature,
            softcap=getattr(self.causal.config, "final_logit_softcapping", None),
            tensor_cores=self.has_tensor_cores,
        )
        head = self.causal.get_output_embeddings()
        with torch.autocast(self.device.type, enabled=False):
            found = target_values(hidden, head.weight, head.bias, targets, scale=scale, entropy=entropy)
        return [batch.scatter(values) for values in found]
