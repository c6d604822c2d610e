"""What a step will need, from config and model shape alone: memory by part, and a lower bound in time.

Pure arithmetic over `ModelShape`; weights are never loaded. What a layer keeps for the backward pass was
counted on real layers of many shapes (RMSNorm, rotary positions, SwiGLU, grouped key heads); the tests
compare the sum with what whole steps allocate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from store.errors import EngineError
from trainer.config import Config, StudentConfig
from trainer.planning.hardware import Device
from trainer.student.policy import LOGITS_PER_CHUNK

OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Bytes of state on the device for each weight that trains; pages go to the host when it is full."""
HIDDEN_BYTES = {True: 24, False: 34}
"""Bytes that a layer keeps for the backward pass for each token and hidden unit, by whether the model is
frozen under adapters: inputs of norms and linear layers."""
CHUNKS_ALIVE = 7
"""Tensors of the size of a chunk of logits that exist at once in its backward pass."""
NF4_BYTES = 4.127 / 8
"""Of a weight: 4 bits, and 0.127 for its share of the scales (QLoRA, section 3)."""

STAYS = ("weights", "optimizer", "reference")
UPDATE = ("gradients", "activations", "logits", "narrow weights in the graph", "gathered layers")
SAMPLING = ("kv cache", "drawing", "narrow weights", "gathered weights", "vllm")
SCORING = ("weights to score with",)
"""Apart from sampling where vllm draws: it sleeps meanwhile."""


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
    intermediate: int
    """Width of the MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes by part in each process, and seconds of one sampling step."""

    memory: dict[str, int]
    sampling_seconds: float
    """When every response has the maximum length, as the next."""
    update_seconds: float
    supervised_seconds: float
    """Of one step of the warm-up, as if every trace had the maximum length."""

    @property
    def seconds(self) -> float:
        return self.sampling_seconds + self.update_seconds

    @property
    def peak(self) -> int:
        """Phases never overlap: the largest of them on top of what always stays."""
        return self._sum(STAYS) + max(map(self._sum, (UPDATE, SAMPLING, SCORING)))

    @property
    def dominant(self) -> str:
        """The largest part of the peak."""
        phase = max((UPDATE, SAMPLING, SCORING), key=self._sum)
        return max((*STAYS, *phase), key=lambda part: self.memory[part])

    def _sum(self, parts: tuple[str, ...]) -> int:
        return sum(self.memory[part] for part in parts)


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
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
    )


def estimate(
    config: Config, shape: ModelShape, device: Device, *, bytes_per_value: int, processes: int = 1
) -> Estimate:
    """Memory and time of a training step.

    Args:
        bytes_per_value: of the compute dtype, 2 or 4.
        processes: GPUs that weights, gradients, optimizer state and samples are dealt out to.
    """
    memory = {
        **_standing_memory(config, shape, bytes_per_value, processes),
        **_update_memory(config, shape, bytes_per_value, processes),
        **_sampling_memory(config, shape, device, bytes_per_value, processes),
    }
    return Estimate(
        memory=memory,
        sampling_seconds=_sampling_seconds(config, shape, device, bytes_per_value, processes),
        update_seconds=_update_seconds(config, shape, device, processes),
        supervised_seconds=_training_seconds(
            config, shape, device, processes, sequences=config.warmup.traces_per_step, optimizer_steps=1
        ),
    )


def _trained(student: StudentConfig, shape: ModelShape) -> int:
    return student.lora_r * shape.linear_widths if student.use_peft else shape.parameters


def _frozen_bytes(student: StudentConfig, shape: ModelShape, bytes_per_value: int) -> int:
    """Of all weights under adapters."""
    linear = NF4_BYTES if student.load_in_4bit else bytes_per_value
    return round(linear * shape.linear) + bytes_per_value * (shape.parameters - shape.linear)


def loaded_bytes(student: StudentConfig, shape: ModelShape, bytes_per_value: int) -> int:
    """What the first of several processes holds in host memory while it reads the weights and deals them out;
    no other ever holds more than its share and a layer."""
    if not student.use_peft:
        return 4 * shape.parameters
    return _frozen_bytes(student, shape, bytes_per_value) + 4 * _trained(student, shape)


def _standing_memory(config: Config, shape: ModelShape, bytes_per_value: int, n: int) -> dict[str, int]:
    """What is there in all phases."""
    student, train = config.student, config.train
    trained = _trained(student, shape)
    frozen = _frozen_bytes(student, shape, bytes_per_value) if student.use_peft else 0
    reference = 0
    if train.beta > 0 and not student.use_peft:
        # Dealt out but for embedding and head, which stay gathered: no backward pass lets go of them.
        reference = 4 * shape.linear // n + 4 * (shape.parameters - shape.linear)
    return {
        "weights": (frozen + 4 * trained) // n,
        "optimizer": OPTIMIZER_BYTES[train.optim] * trained // n,
        "reference": reference,
    }


def _narrow_weights(config: Config, shape: ModelShape, bytes_per_value: int, n: int) -> int:
    """Autocast's copies of what trains; FSDP gathers layers in the narrow type instead."""
    return bytes_per_value * _trained(config.student, shape) if bytes_per_value < 4 and n == 1 else 0


def layer_bytes(student: StudentConfig, shape: ModelShape, bytes_per_value: int) -> int:
    """What one layer keeps of one token for the backward pass."""
    wide = HIDDEN_BYTES[student.use_peft] * shape.hidden
    # In the compute type: gate, its activation, up and their product; keys and values.
    return wide + bytes_per_value * (4 * shape.intermediate + 2 * shape.kv_width)


def _update_memory(config: Config, shape: ModelShape, bytes_per_value: int, n: int) -> dict[str, int]:
    student = config.student
    tokens = max(config.train.max_tokens_per_microbatch, _longest(config))
    layer = tokens * layer_bytes(student, shape, bytes_per_value)
    inputs = tokens * (bytes_per_value if student.use_peft else 4) * shape.hidden
    logits = CHUNKS_ALIVE * 4 * min(LOGITS_PER_CHUNK, tokens * shape.vocabulary)
    kept, narrow = shape.layers * layer, _narrow_weights(config, shape, bytes_per_value, n)
    if student.gradient_checkpointing:  # one layer is whole at a time, once the logits are gone
        kept, narrow = shape.layers * inputs + max(layer - logits, 0), 0
    outside = 4 * (shape.parameters - shape.linear)
    return {
        "gradients": 4 * _trained(student, shape) // n,
        "activations": kept,
        "logits": logits,
        "narrow weights in the graph": narrow,
        # Two layers at a time; embedding and head whole, with their gradient.
        "gathered layers": 2 * outside + 2 * 4 * shape.linear // shape.layers if n > 1 else 0,
    }


def _sampling_memory(
    config: Config, shape: ModelShape, device: Device, bytes_per_value: int, n: int
) -> dict[str, int]:
    rollout = config.rollout
    nothing = dict.fromkeys((*SAMPLING, *SCORING), 0)
    # Each process scores at its own pace, with all weights.
    whole = (bytes_per_value * shape.linear + 4 * (shape.parameters - shape.linear)) if n > 1 else 0
    if rollout.engine == "vllm":
        held = 0 if rollout.base_urls or device.card_memory is None else device.card_memory
        drawing = round(rollout.vllm_gpu_memory_utilization * held)
        return nothing | {"vllm": drawing, "weights to score with": whole}
    rows = _rows(config, n)
    cached = rows * _cache_bytes(config, shape, bytes_per_value)
    prompts = rows * rollout.max_prompt_length
    # Prompts pass through an MLP all at once, before the cache is full.
    passing = prompts * (3 * bytes_per_value * shape.intermediate + 4 * 4 * shape.hidden)
    room = cached * rollout.max_completion_length
    return nothing | {
        "kv cache": cached * _longest(config),
        "narrow weights": _narrow_weights(config, shape, bytes_per_value, n),
        "drawing": max(3 * 4 * rows * shape.vocabulary, passing - room),
        "gathered weights": whole,
    }


def _longest(config: Config) -> int:
    return config.rollout.max_prompt_length + config.rollout.max_completion_length


def _rows(config: Config, n: int) -> int:
    """Sequences that a process samples at once."""
    samples = config.train.problems_per_step * config.rollout.num_generations
    return min(config.rollout.batch_size, math.ceil(samples / n))


def _cache_bytes(config: Config, shape: ModelShape, bytes_per_value: int) -> int:
    """Keys and values of one token; they come out of autocast over float32 weights in float32."""
    narrow = config.student.use_peft or config.rollout.engine == "vllm"
    return 2 * shape.layers * shape.kv_width * (bytes_per_value if narrow else 4)


def _sampling_seconds(
    config: Config, shape: ModelShape, device: Device, bytes_per_value: int, n: int
) -> float:
    """Decoding reads all weights and the cache for each token of a batch: bandwidth binds it, mostly."""
    rollout, student = config.rollout, config.student
    samples, rows = config.train.problems_per_step * rollout.num_generations / n, _rows(config, n)
    # Four bits are widened before they are used: read, written, read.
    linear = NF4_BYTES + 2 * bytes_per_value if student.load_in_4bit else bytes_per_value
    weights = linear * shape.linear + bytes_per_value * (shape.parameters - shape.linear)
    half_full = rollout.max_prompt_length + rollout.max_completion_length / 2
    cache = rows * half_full * _cache_bytes(config, shape, bytes_per_value)
    tokens = math.ceil(samples / rows) * rollout.max_completion_length
    reading = tokens * (weights + cache) / device.bandwidth
    return max(reading, 2 * samples * _longest(config) * shape.parameters / device.flops)


def _update_seconds(config: Config, shape: ModelShape, device: Device, n: int) -> float:
    train = config.train
    return _training_seconds(
        config,
        shape,
        device,
        n,
        sequences=train.problems_per_step * config.rollout.num_generations,
        optimizer_steps=train.problems_per_step // train.mini_batch_problems,
    )


def _training_seconds(
    config: Config, shape: ModelShape, device: Device, n: int, *, sequences: int, optimizer_steps: int
) -> float:
    """Forward 2, gradients of activations 2 and of weights 2 operations a weight and token; a forward pass
    more where activations are computed again, and for old log-probabilities."""
    student = config.student
    passes = 4 if student.use_peft else 6
    passes += 2 if student.gradient_checkpointing else 0
    tokens = sequences * _longest(config) / n
    work = tokens * shape.parameters * (passes + 2 * (optimizer_steps - 1) / optimizer_steps)
    return work / device.flops
