"""Loads the student: model, tokenizer, adapters, on its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from precompute.engines.checks import load_failure
from precompute.engines.four_bits import check_blocks, nf4_on
from precompute.problems.prompts import use_template
from store.errors import EngineError, RunError
from trainer.config import StudentConfig
from trainer.student.adapters import with_adapters
from trainer.student.batches import TokenBatch
from trainer.student.policy import LOGITS_CHUNK_TOKENS, Policy, selective_log_softmax

TEMPLATE_KEY = "student.chat_template"


def load_policy(
    config: StudentConfig,
    *,
    temperature: float,
    weights: Path | None = None,
    place: torch.device | None = None,
    logits_chunk_tokens: int = LOGITS_CHUNK_TOKENS,
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
    return Policy(
        model,
        tokenizer,
        dtype=dtype,
        temperature=temperature,
        device=device,
        logits_chunk_tokens=logits_chunk_tokens,
    )


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
    target_mask = torch.ones_like(ids, dtype=torch.bool)
    target_mask[:, 0] = False
    ours = policy.logprobs(TokenBatch(input_ids=ids, target_mask=target_mask))
    with policy.computing():
        logits = policy.model(input_ids=ids).logits
    (theirs,) = selective_log_softmax(logits[:, :-1].float() / policy.temperature, ids[:, 1:])
    difference = float((ours[:, 1:] - theirs).abs().max())
    # A frozen model's own head answers in its narrow type; ours never does.
    narrow = policy.causal.get_output_embeddings().weight.dtype != torch.float32
    if not difference < (0.5 if narrow else 1e-3):
        kind = type(policy.causal).__name__
        raise EngineError(
            f"{kind} is not supported: its logits differ by {difference:.3g} from head(hidden states)"
        )
