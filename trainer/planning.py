"""`ampo train --dry-run`: validates everything, shows the first prompt and the memory plan, writes nothing.

The plan is arithmetic on the config and the model's shape; weights are never loaded. Activations per token
were counted on real layers (RMSNorm, rotary positions, SwiGLU, grouped key-value heads); a test compares the
plan with what an optimizer step allocates. What a run really takes is measured in every step
(`memory/peak_mib`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM

from precompute.engines.checks import stop_ids_of
from precompute.problems.prompts import tokenizer_fingerprint, turn_end
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError, UserError
from store.reader import TraceStore
from store.records import Problem
from trainer.config import Config, StudentConfig
from trainer.method.rollouts import demanded_form
from trainer.method.sft import choose_traces
from trainer.parallel.fsdp import check_shardable
from trainer.parallel.world import World
from trainer.run.checkpoint import check_config, read_state
from trainer.run.prompts import fitting_prompts, warn_of_prompts
from trainer.run.resume import find_start
from trainer.run.run_dir import Position, RunFiles
from trainer.run.saved_model import check_model
from trainer.run.setup import (
    check_names,
    check_plan,
    check_tokenizers,
    covered,
    open_store,
    reads_store,
    trace_reader,
    usable_problems,
)
from trainer.sampling.samplers import check_sampler
from trainer.student.load import compute_dtype, load_tokenizer, pick_device
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.trackers import Trackers

T = TypeVar("T")

CARDS = {
    "B200": 180, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "A6000": 48, "RTX5090": 32, "RTX4090": 24,
    "RTX3090": 24, "A10G": 24, "L4": 24, "T4": 16,
}  # fmt: skip
"""Card -> memory in GB; any other is planned for by its size, e.g. `A100-40GB`."""
USABLE_SHARE = 0.9
"""Share of a card's memory that tensors can use: the CUDA context and fragmentation take the rest."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Bytes of optimizer state on the device per trained weight; pages move to the host when it is full."""
HIDDEN_BYTES = {True: 24, False: 34}
"""Bytes that a layer keeps for the backward pass per token and hidden unit: with adapters, without."""
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
"""Largest part of the peak -> the keys that reduce it, those that leave the result unchanged first."""


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


MemoryPlan = dict[str, dict[str, int]]
"""`always`, `update` and `sampling` -> part -> bytes on each device. Update and sampling never overlap."""


def dry_run(config: Config, *, gpu: str = "", processes: int = 1) -> tuple[Group, list[UserError]]:
    """Returns what a run would do, and the errors that would end it before its first step.

    Raises what the config and an existing run rule out; missing problems, store or student are collected.

    Args:
        gpu: the card to plan for, by name; empty: the local device.
        processes: number of GPUs that share the run.
    """
    card_bytes = card_memory(gpu) if gpu else _local_memory(config.student)
    check_names(config)
    check_sampler(config)
    check_shardable(config, World(size=processes))
    run = RunFiles(Path(config.run.dir).absolute() / config.run.name)
    run.check_writable()
    start_from = find_start(run, config, "auto")
    if start_from is not None:
        check_config(read_state(start_from), config, start_from)
    reporter, missing = TrainReporter(), list[UserError]()

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            missing.append(error)
            return None

    prompt: list[Text] | None = None
    with ExitStack() as stack:
        stack.enter_context(Trackers(config.run.report_to))
        verifier = stack.enter_context(Verifier.configured(config.verify))
        problems = attempt(partial(usable_problems, config, "train", verifier, reporter))
        held_out: list[Problem] | None = []
        if config.eval.every:
            held_out = attempt(partial(usable_problems, config, "eval", verifier, reporter))
        store = attempt(partial(open_store, config, stack))
        student = attempt(partial(_read_student, config.student))
        lines = _counts(config, problems, held_out, store)
        if problems is not None and student is not None:
            prompts = partial(_check_prompts, config, problems, held_out or [], store, *student, reporter)
            prompt = attempt(prompts)
    lines = [*(f"warning: {text}" for text in reporter.warnings), *lines]
    lines.append(_start_line(config, run, start_from))
    memory: Sequence[Table | Text] = [Text("no memory plan: the student's config.json cannot be read")]
    if student is not None:
        memory = memory_report(config, shape_of(student[1]), card_bytes, gpu, processes)
    return Group(Text("\n".join(lines)), *(prompt or ()), *memory), missing


def _read_student(student: StudentConfig) -> tuple[Any, Any]:
    """Returns the tokenizer and the model's config; EngineError when one cannot be read."""
    check_model(student)
    return load_tokenizer(student), load_model_config(student)


def _counts(
    config: Config, problems: list[Problem] | None, held_out: list[Problem] | None, store: TraceStore | None
) -> list[str]:
    lines = [] if reads_store(config) else ["the store is not queried"]
    if problems is not None and store is not None:
        lines = [f"{covered(store, problems, config)} problems have a verified trace in the store"]
    if problems is not None and held_out is not None:
        lines.insert(0, f"{len(problems)} training problems, {len(held_out)} held-out problems")
    return lines


def _check_prompts(
    config: Config,
    problems: list[Problem],
    held_out: list[Problem],
    store: TraceStore | None,
    tokenizer: Any,
    model_config: Any,
    reporter: TrainReporter,
) -> list[Text]:
    """Checks prompts and traces; returns the first prompt as the student sees it."""
    prompts = fitting_prompts(config, problems, tokenizer, reporter)
    eval_prompts = fitting_prompts(config, held_out, tokenizer, reporter) if held_out else []
    warn_of_prompts(config, tokenizer, prompts, reporter)
    check_plan(config, prompts, eval_prompts, model_config, reporter)
    form = demanded_form(config.student, problems)
    if store is not None and config.guidance.reads_teacher_logprobs:
        check_tokenizers(store.teachers(), tokenizer_fingerprint(tokenizer), config.guidance.teachers)
    if store is not None and config.sft.steps:
        ends = stop_ids_of(config.student.model, config.student.revision, tokenizer)
        tokens = _Tokens(tokenizer, ends, turn_end(tokenizer, ends))
        choose_traces(config.sft, trace_reader(config, store, tokens, form, own_ids=False), prompts)
    return [
        Text(f"final answers in the form {form}; first prompt ({len(prompts[0].ids)} tokens):"),
        Text(prompts[0].text, style="cyan"),
    ]


@dataclass(slots=True)
class _Tokens:
    """The token facts of a student that is not loaded."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    eos_id: int


def _start_line(config: Config, run: RunFiles, start_from: Path | None) -> str:
    if start_from is not None:
        done = Position.of(start_from)
        return f"run {run.root}: would resume after {done}, up to step {config.train.max_steps}"
    sft = f"{config.sft.steps} SFT steps and " if config.sft.steps else ""
    return f"run {run.root}: would start, {sft}{config.train.max_steps} steps"


def card_memory(name: str) -> int:
    """Returns the bytes of a card, of CARDS or with its size in the name. ConfigError for any other."""
    size = re.fullmatch(r".*?(\d+)GB", name)
    if size is None and name not in CARDS:
        known = ", ".join(CARDS)
        raise ConfigError(
            f"--gpu {name!r} is not known: give {known}, or a name with its size, e.g. MI300-192GB"
        )
    return int(size[1] if size else CARDS[name]) * 10**9


def _local_memory(student: StudentConfig) -> int | None:
    device = pick_device(student.device)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def load_model_config(student: StudentConfig) -> Any:
    """Returns the model's config.json, local or from the hub; EngineError when it cannot be read."""
    try:
        return AutoConfig.from_pretrained(student.model, revision=student.revision)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise EngineError(f"student.model = {student.model!r} cannot be loaded: {first}") from error


def shape_of(model_config: Any) -> ModelShape:
    """Counts the parameters on the meta device, without memory for them."""
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    layers = [layer for layer in skeleton.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    text = model_config.get_text_config()
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
    linear = NF4_BYTES if student.load_in_4bit else width
    frozen = round(linear * shape.linear) + width * outside if student.use_peft else 0
    state = OPTIMIZER_BYTES[train.optim]
    always = {"weights": (frozen + 4 * trained) // processes, "optimizer": state * trained // processes}
    if train.beta > 0 and not student.use_peft:
        always["reference"] = 4 * shape.linear // processes + 4 * outside
    copies = width * trained if width < 4 and processes == 1 else 0  # autocast's, of the weights that train
    longest = rollout.max_prompt_length + rollout.max_completion_length
    tokens = max(train.max_tokens_per_microbatch, longest)
    logits = LOGITS_COPIES * 4 * min(train.logits_chunk_tokens, tokens) * shape.vocabulary
    mlp = width * (4 * shape.intermediate + 2 * shape.kv_width)
    layer = tokens * (HIDDEN_BYTES[student.use_peft] * shape.hidden + mlp)
    activations = shape.layers * layer
    if student.gradient_checkpointing:  # the inputs of all layers; one layer whole, when the logits are freed
        activations = shape.layers * tokens * (width if student.use_peft else 4) * shape.hidden
        activations += max(layer - logits, 0)
    update = {"gradients": 4 * trained // processes, "activations": activations, "logits": logits}
    update["16-bit weights"] = 0 if student.gradient_checkpointing else copies
    sampling = {"16-bit weights": copies}
    if processes > 1:  # two layers at a time in the update, all of them while a rank samples or scores
        update["gathered weights"] = 2 * outside + 2 * 4 * shape.linear // shape.layers
        sampling["gathered weights"] = width * shape.linear + 4 * outside
    if rollout.engine == "transformers":
        rows = min(rollout.batch_size, -(-train.problems_per_step * rollout.num_generations // processes))
        cached = width if student.use_peft else 4  # autocast over float32 weights gives a float32 cache
        sampling["KV cache"] = rows * longest * 2 * shape.layers * shape.kv_width * cached
        sampling["logits"] = 3 * 4 * rows * shape.vocabulary
    elif not rollout.base_urls:  # vLLM sleeps while a rank scores or updates
        sampling = {"vLLM": round(rollout.vllm_gpu_memory_utilization * (card_bytes or 0))}
    return {"always": always, "update": update, "sampling": sampling}


def parts_at_peak(plan: MemoryPlan) -> dict[str, int]:
    """Returns part -> bytes at the peak, the largest first."""
    larger = max(plan["update"], plan["sampling"], key=lambda parts: sum(parts.values()))
    return dict(sorted((plan["always"] | larger).items(), key=lambda item: -item[1]))


def memory_report(
    config: Config, shape: ModelShape, card_bytes: int | None, gpu: str, processes: int
) -> tuple[Text, Table, Text]:
    """Returns memory per part, the peak, and what to change where it does not fit."""
    device = torch.device("cuda") if gpu else pick_device(config.student.device)
    width = compute_dtype(config.student, device).itemsize
    plan = plan_memory(config, shape, width=width, processes=processes, card_bytes=card_bytes)
    on = f"{gpu or device}" + (f", each of {processes} ranks" if processes > 1 else "")
    table = Table("part", "when")
    table.add_column("MiB", justify="right")
    for when, parts in plan.items():
        for part, size in sorted(parts.items(), key=lambda item: -item[1]):
            if size:
                table.add_row(part, when, _mib(size))
    table.add_section()
    at_peak = parts_at_peak(plan)
    peak = sum(at_peak.values())
    table.add_row("peak", "", _mib(peak))
    remedies = [f"  {part}: {REMEDIES[part]}" for part in at_peak if part in REMEDIES]
    lines = [f"largest part of the peak: {next(iter(at_peak))}"]
    if card_bytes is not None:
        usable = round(USABLE_SHARE * card_bytes)
        table.add_row("usable", "", _mib(usable))
        lines += [f"fits {on}"] if peak <= usable else [f"does not fit {on}; change:", *remedies[:3]]
    title = Text(f"memory of a step: {shape.parameters:,} parameters on {on}")
    return title, table, Text("\n".join(lines))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
