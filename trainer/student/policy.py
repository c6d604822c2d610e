"""The student: loading it, and the log-probabilities of tokens under it.

`[B, L, V]` logits never exist: hidden states are computed for all positions, logits only for the tokens that
are asked about, a chunk of tokens at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from precompute.engines.checks import eos_ids, load_failure
from precompute.engines.four_bits import check_blocks, nf4_on
from precompute.problems.prompts import turn_end, use_template
from store.errors import EngineError, RunError
from trainer.config import StudentConfig
from trainer.method.objective import log_softmax_and_entropy, selective_log_softmax
from trainer.student.adapters import with_adapters
from trainer.student.batches import TokenBatch
from trainer.student.head import head_logits

TEMPLATE_KEY = "student.chat_template"

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


def load_policy(
    config: StudentConfig,
    *,
    temperature: float,
    weights: Path | None = None,
    place: torch.device | None = None,
) -> Policy:
    """The student on its device, weights that train in float32.

    Args:
        weights: a checkpoint to go on from.
        place: where the weights are to be at first; None: on the student's device. On `meta` there are none,
            and nothing of them can be checked.

    Raises EngineError when the model cannot be loaded, or its logits are not what its head makes of its
    hidden states (a head of another make would train on wrong numbers in silence).
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config, weights)
    model = _load_model(config, device, weights, place or device)
    # Sampling options that a model ships are not ours, and invalid ones would stop the first checkpoint.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        bos_token_id=model.generation_config.bos_token_id,
    )
    if config.use_peft:
        model = with_adapters(model, config, None if place and place.type == "meta" else weights)
    _switch_dropout_off(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if place is None or place.type != "meta":
        _check_head(Policy(model, tokenizer, dtype=torch.float32, temperature=temperature))
    dtype = compute_dtype(config, device)
    return Policy(model, tokenizer, dtype=dtype, temperature=temperature, device=device)


def _load_model(
    config: StudentConfig, device: torch.device, weights: Path | None, place: torch.device
) -> Any:
    """The model at `place`, to compute on `device`. Under `use_peft` always `student.model`: checkpoints
    hold adapters alone."""
    dtype = compute_dtype(config, device)
    own = weights is None or config.use_peft
    source, revision = (config.model, config.revision) if own else (str(weights), None)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype if config.use_peft else torch.float32,
            **(nf4_on(device, dtype) if config.load_in_4bit else {}),
            **({"device_map": {"": "meta"}} if place.type == "meta" else {}),
        )
        if not config.load_in_4bit:
            return model.to(place)
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        raise EngineError(
            f"student.model = {source!r} cannot be loaded: {load_failure(source, error)}"
        ) from error
    check_blocks(model, device, named=f"student.model = {source!r}", instead="set load_in_4bit = false")
    return model


def load_tokenizer(config: StudentConfig, checkpoint: Path | None = None) -> Any:
    """The student's tokenizer with the config's chat template, or the one that `checkpoint` holds.

    Raises EngineError when there is none, ConfigError when the template cannot be read, and RunError when
    the checkpoint was trained with another template.
    """
    source, revision = (str(checkpoint), None) if checkpoint else (config.model, config.revision)
    if not source:
        raise EngineError("student.model is not set: give a model directory or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"no tokenizer at student.model = {source!r}: {load_failure(source, error)}"
        ) from error
    trained_with = tokenizer.chat_template
    use_template(tokenizer, config.chat_template, key=TEMPLATE_KEY)
    if checkpoint and tokenizer.chat_template != trained_with:
        raise RunError(
            f"{checkpoint} was trained with another chat template than {TEMPLATE_KEY} = "
            f"{config.chat_template!r} holds; set it back, or start anew under another run.name"
        )
    return tokenizer


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; asking for CUDA where there is none is an EngineError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError('student.device = "cuda", but torch sees no CUDA device; use "auto" or "cpu"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(config: StudentConfig, device: torch.device) -> torch.dtype:
    """What the forward pass computes in on that device."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def _switch_dropout_off(model: nn.Module) -> None:
    """Dropout would make the ratio differ from 1 before any update."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - nn.Module types its attributes as tensors


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    ids = (
        torch.arange(1, 9, device=policy.device)
        .remainder(policy.causal.config.get_text_config().vocab_size)
        .unsqueeze(0)
    )
    asked = torch.ones_like(ids, dtype=torch.bool)
    asked[:, 0] = False
    ours = policy.logprobs(TokenBatch(input_ids=ids, attention_mask=torch.ones_like(ids), asked=asked))
    with policy.computing():
        logits = policy.model(input_ids=ids).logits
    theirs = selective_log_softmax(logits[:, :-1].float() / policy.temperature, ids[:, 1:])
    difference = float((ours[:, 1:] - theirs).abs().max())
    # A frozen model's own head answers in its narrow type; ours never does.
    narrow = policy.causal.get_output_embeddings().weight.dtype != torch.float32
    if not difference < (0.5 if narrow else 1e-3):
        kind = type(policy.causal).__name__
        raise EngineError(
            f"{kind} is not supported: its logits differ by {difference:.3g} from head(hidden states)"
        )
