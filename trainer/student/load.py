"""Loads the student: model, LoRA adapters and tokenizer, on its device.

Sources: LoRA arXiv 2106.09685; QLoRA arXiv 2305.14314 (nf4, double quantization, all linear layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from precompute.engines.checks import load_failure
from precompute.engines.four_bits import check_blocks, nf4_on
from precompute.problems.prompts import use_template
from store.errors import EngineError, RunError
from trainer.config import StudentConfig
from trainer.student.adapters import adapter_settings, import_peft, over_base, with_adapters
from trainer.student.batches import pad
from trainer.student.policy import Policy

TEMPLATE_KEY = "student.chat_template"


def load_policy(
    config: StudentConfig,
    *,
    temperature: float,
    weights: Path | None = None,
    initial_device: torch.device | None = None,
) -> Policy:
    """Loads the student, with weights that train in float32.

    Args:
        weights: a checkpoint to load instead of `student.model`, or adapters over it.
        initial_device: device that holds the weights until `shard` moves them; None: the student's device. On
            `meta` a model has no weights.

    Raises EngineError when the model cannot be loaded, or when its logits are not head(hidden states), as
    with an unknown kind of head, which would train on wrong numbers in silence.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = pick_device(config.device)
    dtype = compute_dtype(config, device)
    tokenizer = load_tokenizer(config, weights)
    on_meta = initial_device is not None and initial_device.type == "meta"
    config, trained_on = over_base(config)
    model = _load_model(config, device, weights, initial_device or device)
    # Sampling options of a model have no effect here, and invalid ones would stop the first checkpoint.
    special = ("eos_token_id", "pad_token_id", "bos_token_id")
    kept = {name: getattr(model.generation_config, name) for name in special}
    model.generation_config = GenerationConfig(**kept)  # type: ignore[no-untyped-call]
    if config.use_peft:
        with naming_the_model(str(weights or trained_on or config.model)):
            model = with_adapters(model, config, weights or trained_on)
    model.eval()  # for good: dropout and router noise would make the update's log-probabilities others
    if config.gradient_checkpointing:
        _recompute_layers(model)
    if not on_meta:
        _check_head(Policy(model, tokenizer, dtype=torch.float32))
    return Policy(model, tokenizer, dtype=dtype, temperature=temperature, device=device)


@contextmanager
def naming_the_model(source: str) -> Iterator[None]:
    """Turns an error of transformers in the block into an EngineError of one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        raise EngineError(
            f"student.model = {source!r} cannot be loaded: {load_failure(source, error)}"
        ) from error


def _load_model(
    config: StudentConfig, device: torch.device, weights: Path | None, initial_device: torch.device
) -> Any:
    """Loads the model to `initial_device`; under `use_peft` always `student.model`, below the adapters."""
    dtype = compute_dtype(config, device)
    is_checkpoint = weights is not None and not config.use_peft
    source, revision = (str(weights), None) if is_checkpoint else (config.model, config.revision)
    options: dict[str, Any] = {"dtype": dtype if config.use_peft else torch.float32}
    if config.load_in_4bit:
        options |= nf4_on(device, dtype)
    elif initial_device.type == "meta":
        options["device_map"] = {"": "meta"}
    with naming_the_model(source):
        model = _with_merged_adapters(source, revision, options)
        if not config.load_in_4bit:
            return model.to(initial_device)
    check_blocks(model, device, named=f"student.model = {source!r}", instead="set load_in_4bit = false")
    return model


def _with_merged_adapters(source: str, revision: str | None, options: dict[str, Any]) -> Any:
    """Returns the model of a directory or hub name; adapters below those that train are merged."""
    settings = adapter_settings(source)
    if settings is None:
        return AutoModelForCausalLM.from_pretrained(source, revision=revision, **options)
    if "quantization_config" in options:
        raise EngineError(f"{source} holds LoRA adapters, which 4-bit weights cannot hold: merge them first")
    below, revision = settings["base_model_name_or_path"], settings.get("revision")
    model = _with_merged_adapters(below, revision, options)
    return import_peft().PeftModel.from_pretrained(model, source).merge_and_unload()


def load_tokenizer(config: StudentConfig, checkpoint: Path | None = None) -> Any:
    """Loads the student's tokenizer with the config's chat template, or the tokenizer of `checkpoint`.

    Raises EngineError without a tokenizer, ConfigError when the template cannot be read, and RunError when
    the checkpoint was trained with another template.
    """
    source, revision = (str(checkpoint), None) if checkpoint else (config.model, config.revision)
    while (settings := adapter_settings(source)) and not Path(source, "tokenizer_config.json").is_file():
        source, revision = settings["base_model_name_or_path"], settings.get("revision")  # peft writes none
    with naming_the_model(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    trained_with = tokenizer.chat_template
    use_template(tokenizer, config.chat_template, key=TEMPLATE_KEY)
    if checkpoint and tokenizer.chat_template != trained_with:
        raise RunError(
            f"{checkpoint} was trained with another chat template than {TEMPLATE_KEY} = "
            f"{config.chat_template!r} holds; set it back, or start again under another run.name"
        )
    return tokenizer


def pick_device(name: str) -> torch.device:
    """Returns the device of `student.device`; `auto` is CUDA where torch sees it, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError('student.device = "cuda", but torch sees no CUDA device; use "auto" or "cpu"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(config: StudentConfig, device: torch.device) -> torch.dtype:
    """Returns the type that the forward pass computes in on that device."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def _recompute_layers(model: nn.Module) -> None:
    """Makes each layer keep its input alone and compute the rest again in the backward pass.

    transformers' own switch works in training mode only, where some models drop out or add noise.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        name = type(model).__name__
        raise EngineError(
            f"student.gradient_checkpointing = true is not possible for {name}; set it to false"
        )
    for layer in layers:
        setattr(layer, "forward", partial(_recomputed, layer.forward))  # noqa: B010 - typed as a method


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        return recompute(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Raises EngineError when the model's own log-probabilities differ from the policy's."""
    vocabulary = policy.causal.config.get_text_config().vocab_size
    ids = [index % vocabulary for index in range(1, 9)]
    batch = pad([ids], [7], pad_id=policy.pad_id, device=policy.device)
    logits = policy.model(input_ids=batch.input_ids).logits[:, :-1].float()
    theirs = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    difference = float((policy.logprobs(batch)[:, 1:] - theirs).abs().max())
    # A frozen model's own head may compute in 16 bits; the policy's never does.
    is_16_bit = policy.causal.get_output_embeddings().weight.dtype != torch.float32
    if not difference < (0.5 if is_16_bit else 1e-3):
        raise EngineError(
            f"{type(policy.causal).__name__} is not supported: "
            f"its logits differ by {difference:.3g} from head(hidden states)"
        )
