"""`ampo train --dry-run`: validates everything, shows the first prompt and the memory plan, writes nothing.

The plan is coarse arithmetic on the config and the model's shape (within a quarter of what a step allocates);
weights are never loaded. What a run really takes is measured in every step (`memory/peak_mib`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM

from precompute.engines.checks import load_failure
from precompute.problems.prompts import tokenizer_fingerprint
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError, UserError
from trainer.config import Config, StudentConfig
from trainer.parallel.world import World
from trainer.run.checkpoint import check_config, read_state
from trainer.run.prompts import checked_prompts, usable_problems
from trainer.run.resume import find_start
from trainer.run.run_dir import Position, RunFiles
from trainer.run.saved_model import check_model
from trainer.run.setup import check_choices, check_tokenizers, covered, open_store
from trainer.student.load import compute_dtype, load_tokenizer, pick_device
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.trackers import Trackers

T = TypeVar("T")

USABLE_SHARE = 0.9
"""Share of a card's memory that tensors can use: the CUDA context and fragmentation take the rest."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Bytes of optimizer state on the device per trained weight; pages move to the host when it is full."""
HIDDEN_BYTES = 34
"""Bytes that a layer keeps for the backward pass per token and hidden unit, counted on real layers."""
LOGITS_COPIES = 7
"""Tensors of the size of one chunk of logits that exist at once in its backward pass."""
NF4_BYTES = 4.127 / 8
"""Bytes of a 4-bit weight, its share of the scales included (QLoRA, section 3)."""
REMEDIES = {
    "vLLM": "rollout.vllm_gpu_memory_utilization, or servers in rollout.base_urls",
    "activations": "student.gradient_checkpointing=true, train.max_tokens_per_microbatch",
    "logits": "train.logits_chunk_tokens",
    "KV cache": "rollout.batch_size, or rollout.engine=vllm",
    "optimizer": "train.optim=adamw_8bit, paged_adamw_8bit (one GPU), torchrun (more), student.use_peft=true",
    "gradients": "torchrun (more GPUs), student.use_peft=true",
    "reference": "train.beta=0",
    "weights": "torchrun (more GPUs), student.use_peft=true (then student.load_in_4bit=true)",
}
"""Part of the peak -> the keys that reduce it, those that leave the result unchanged first."""

MemoryPlan = dict[str, dict[str, int]]
"""`update` and `sampling`, which never overlap -> part -> bytes on each device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that memory depends on."""

    parameters: int
    linear: int
    """Parameters in linear layers other than the head: 4 bits and adapters apply to them."""
    linear_widths: int
    """Inputs plus outputs of those layers, summed: an adapter of rank r has r parameters for each."""
    vocabulary: int
    layers: int
    hidden: int
    kv_width: int
    """Key-value heads times head size."""
    intermediate: int
    """Width of the MLP."""


def dry_run(config: Config, *, gpu: str = "", processes: int = 1) -> tuple[Group, list[UserError]]:
    """Returns what a run would do, and the errors of missing problems, store or student.

    Raises everything else that would end the run before its first step, except what needs the weights or the
    traces.

    Args:
        gpu: the card to plan for, with its size in the name; empty: the local device.
        processes: number of GPUs that share the run.
    """
    card_bytes = card_memory(gpu, config.student)
    check_choices(config, World(size=processes))
    run = RunFiles(Path(config.run.dir).absolute() / config.run.name)
    run.check_writable()
    start_from = find_start(run, config, "auto")
    if start_from is not None:
        check_config(read_state(start_from), config, start_from)
    after = "would start" if start_from is None else f"would resume after {Position.of(start_from)}"
    lines = [f"run {run.root}: {after}, up to step {config.train.max_steps}"]
    reporter, missing = TrainReporter(), list[UserError]()

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            missing.append(error)
            return None

    with ExitStack() as stack:
        stack.enter_context(Trackers(config.run.report_to))
        verifier = stack.enter_context(Verifier.configured(config.verify))
        problems = attempt(lambda: usable_problems(config, "train", verifier, reporter)) or []
        held_out = []
        if config.eval.every:
            held_out = attempt(lambda: usable_problems(config, "eval", verifier, reporter)) or []
        store = attempt(lambda: open_store(config, stack))
        student = attempt(lambda: read_student(config.student))
        lines.append(f"{len(problems)} training problems, {len(held_out)} held-out problems")
        if store is not None:
            lines.append(f"{covered(store, problems, config)} problems have a verified trace in the store")
        if student is not None and store is not None and config.guidance.reads_teacher_logprobs:
            check_tokenizers(store.teachers(), tokenizer_fingerprint(student[0]), config.guidance.teachers)
        if student is not None and problems:
            prompts = attempt(lambda: checked_prompts(config, problems, held_out, *student, reporter))
            lines += [f"first prompt:\n{prompts[0][0].text}"] if prompts else []
    lines += [f"warning: {text}" for text in reporter.warnings]
    if student is None:
        lines.append("no memory plan: the student's config.json cannot be read")
    plan = memory_report(config, shape_of(student[1]), card_bytes, processes) if student else ()
    return Group(Text("\n".join(lines)), *plan), missing


def read_student(student: StudentConfig) -> tuple[Any, Any]:
    """Returns the tokenizer and the model's config; EngineError when one cannot be read."""
    check_model(student)
    try:
        model_config = AutoConfig.from_pretrained(student.model, revision=student.revision)
    except (OSError, ValueError) as error:
        reason = load_failure(student.model, error)
        raise EngineError(f"student.model = {student.model!r} cannot be loaded: {reason}") from error
    return load_tokenizer(student), model_config


def card_memory(gpu: str, student: StudentConfig) -> int | None:
    """Returns the bytes of the card `gpu`, by default the local one; None on the CPU."""
    if gpu:
        if size := re.search(r"(\d+)GB$", gpu):
            return int(size[1]) * 10**9
        raise ConfigError(f"--gpu {gpu!r}: end the name with the card's memory, e.g. H100-80GB")
    device = pick_device(student.device)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def shape_of(model_config: Any) -> ModelShape:
    """Counts the parameters on the meta device, without memory for them."""
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    layers = [layer for layer in skeleton.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    text = model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        parameters=skeleton.num_parameters(),
        linear=sum(layer.weight.numel() for layer in layers),
        linear_widths=sum(layer.in_features + layer.out_features for layer in layers),
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        kv_width=heads * size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
    )


def plan_memory(
    config: Config, shape: ModelShape, *, width: int, processes: int = 1, card_bytes: int | None = None
) -> MemoryPlan:
    """Returns the bytes of each part per device.

    Args:
        width: bytes of a value in the compute dtype, 2 or 4.
        processes: number of GPUs that weights, gradients, optimizer state and samples are sharded over.
    """
    student, train, rollout = config.student, config.train, config.rollout
    outside = shape.parameters - shape.linear  # embedding, head and norms, which are never in 4 bits
    trained = student.lora_r * shape.linear_widths if student.use_peft else shape.parameters
    weights = 4 * trained
    if student.use_peft:
        weights += round((NF4_BYTES if student.load_in_4bit else width) * shape.linear) + width * outside
    elif width < 4 and processes == 1:
        weights += width * trained  # autocast's copies
    always = {
        "weights": weights // processes,
        "optimizer": OPTIMIZER_BYTES[train.optim] * trained // processes,
        "reference": 4 * shape.parameters // processes if train.beta > 0 and not student.use_peft else 0,
    }
    kept = width if student.use_peft else 4  # autocast over float32 weights keeps hidden states in float32
    longest = rollout.max_prompt_length + rollout.max_completion_length
    tokens = max(train.max_tokens_per_microbatch, longest)
    of_layer = HIDDEN_BYTES * shape.hidden + width * (4 * shape.intermediate + 2 * shape.kv_width)
    if student.gradient_checkpointing:
        of_layer = kept * shape.hidden  # its input; a layer that is computed again takes less than the logits
    update = {
        "gradients": 4 * trained // processes,
        "activations": shape.layers * tokens * of_layer,
        "logits": LOGITS_COPIES * 4 * min(train.logits_chunk_tokens, tokens) * shape.vocabulary,
    }
    sampling = {}
    if processes > 1:  # two layers at a time in the update, all of them while a rank samples or scores
        update["gathered weights"] = 2 * outside + 2 * 4 * shape.linear // shape.layers
        sampling["gathered weights"] = width * shape.linear + 4 * outside
    if rollout.engine == "transformers":
        rows = min(rollout.batch_size, -(-train.problems_per_step * rollout.num_generations // processes))
        sampling["KV cache"] = rows * longest * 2 * shape.layers * shape.kv_width * kept
    elif not rollout.base_urls:  # vLLM sleeps while a rank scores or updates
        sampling = {"vLLM": round(rollout.vllm_gpu_memory_utilization * (card_bytes or 0))}
    return {"update": always | update, "sampling": always | sampling}


def memory_report(
    config: Config, shape: ModelShape, card_bytes: int | None, processes: int
) -> tuple[Table, Text]:
    """Returns memory per part and phase, the peak, and what reduces it."""
    device = torch.device("cpu" if card_bytes is None else "cuda")
    width = compute_dtype(config.student, device).itemsize
    plan = plan_memory(config, shape, width=width, processes=processes, card_bytes=card_bytes)
    table = Table("MiB on each device", title=f"memory of a step, {shape.parameters:,} parameters")
    for phase in plan:
        table.add_column(phase, justify="right")
    for part in plan["update"] | plan["sampling"]:
        table.add_row(part, *(f"{parts.get(part, 0) / 2**20:,.0f}" for parts in plan.values()))
    at_peak = max(plan.values(), key=lambda parts: sum(parts.values()))
    peak = sum(at_peak.values())
    lines = [f"peak {peak / 2**20:,.0f} MiB"]
    if card_bytes is not None:
        usable = USABLE_SHARE * card_bytes
        fits = "fits" if peak <= usable else "does not fit"
        lines[0] += f" of {usable / 2**20:,.0f} MiB usable: {fits}"
    largest = sorted((part for part in at_peak if part in REMEDIES), key=lambda part: -at_peak[part])
    lines += ["to reduce the largest parts:", *(f"  {part}: {REMEDIES[part]}" for part in largest[:3])]
    return table, Text("\n".join(lines))
