"""What a step will need, from config and model shape alone: memory by part, and a lower bound in time.

Pure arithmetic over `ModelShape`; weights are never loaded. Activations follow Korthikanti et al. 2022
(arXiv 2205.05198), about 34 bytes a token, hidden unit and layer in 16 bits with fused attention.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from store.errors import EngineError
from trainer.config import Config, StudentConfig
from trainer.policy import LOGITS_PER_CHUNK, pick_device

OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of state for each weight that trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What memory and time depend on."""

    parameters: int
    linear: int
    """Parameters in linear layers other than the head: what 4 bits and adapters apply to."""
    linear_widths: int
    """Inputs plus outputs of those layers, summed: an adapter of rank r has r of each."""
    vocabulary: int
    layers: int
    hidden: int
    kv_width: int
    """Key-value heads times head size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes by part, and seconds of arithmetic of one step."""

    memory: dict[str, int]
    seconds: float
    """When every response has the maximum length and nothing but matrix products costs time."""

    @property
    def peak(self) -> int:
        """Sampling and updating never overlap: the larger of the two on top of what always stays."""
        stays = sum(self.memory[part] for part in ("weights", "optimizer", "reference", "narrow weights"))
        update = sum(self.memory[part] for part in ("gradients", "activations", "logits"))
        return stays + max(update, self.memory["kv cache"])


def load_model_config(student: StudentConfig) -> Any:
    """The model's own config; EngineError when there is none."""
    try:
        return AutoConfig.from_pretrained(student.model, revision=student.revision)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise EngineError(f"student.model = {student.model!r} cannot be loaded: {first}") from error


def shape_of(config: Any) -> ModelShape:
    """Counts the parameters of a model config without making them."""
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    layers = [layer for layer in skeleton.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        linear=sum(layer.weight.numel() for layer in layers),
        linear_widths=sum(layer.in_features + layer.out_features for layer in layers),
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        kv_width=heads * size,
    )


def estimate(config: Config, shape: ModelShape, *, flops: float, bytes_per_value: int) -> Estimate:
    """Memory and time of a training step.

    Args:
        flops: what the device reaches, in floating-point operations a second.
        bytes_per_value: of the compute dtype, 2 or 4.
    """
    rollout, train = config.rollout, config.train
    longest = rollout.max_prompt_length + rollout.max_completion_length
    rows = min(rollout.batch_size, train.problems_per_step * rollout.num_generations)
    layers = 1 if config.student.gradient_checkpointing else shape.layers
    kept = 2 * shape.layers if config.student.gradient_checkpointing else 0
    tokens = max(train.max_tokens_per_microbatch, longest)
    weights, trained = _weights(config.student, shape, bytes_per_value)
    memory = {
        "weights": weights,
        "gradients": 4 * trained,
        "optimizer": OPTIMIZER_BYTES[train.optim] * trained,
        # Under adapters the frozen model itself is the reference.
        "reference": 4 * shape.parameters if train.beta and not config.student.use_peft else 0,
        "activations": tokens * shape.hidden * bytes_per_value * (17 * layers + kept),
        "logits": 3 * 4 * min(LOGITS_PER_CHUNK, tokens * shape.vocabulary),
        # Keys and values come out of autocast in float32, and autocast keeps a narrow copy of the weights.
        "kv cache": rows * longest * 2 * shape.layers * shape.kv_width * 4,
        "narrow weights": bytes_per_value * trained if bytes_per_value < 4 else 0,
    }
    responses = train.problems_per_step * rollout.num_generations
    passes = 8 if config.student.gradient_checkpointing else 6
    work = responses * longest * shape.parameters * (2 + passes)
    return Estimate(memory=memory, seconds=work / flops)


def _weights(student: StudentConfig, shape: ModelShape, bytes_per_value: int) -> tuple[int, int]:
    """Bytes of all weights, and how many of them train."""
    if not student.use_peft:
        return 4 * shape.parameters, shape.parameters
    trained = student.lora_r * shape.linear_widths
    # nf4 with double quantization: 4 bits and 0.127 for the scales of each weight (QLoRA, section 3).
    linear = round(4.127 / 8 * shape.linear) if student.load_in_4bit else bytes_per_value * shape.linear
    return linear + bytes_per_value * (shape.parameters - shape.linear) + 4 * trained, trained


def measured_flops(device_name: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product on the device, best of five."""
    device = pick_device(device_name)
    n = 4096 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best
