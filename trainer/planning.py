"""`ampo train --dry-run`: validates everything, shows the first prompt and the memory plan, writes nothing.

The plan is coarse arithmetic on the config and the model's shape (within a quarter of what a step allocates);
weights are never loaded. What a run really takes is measured in every step (`memory/peak_mib`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM

from precompute.problems.prompts import check_form, tokenizer_fingerprint
from precompute.run.reverify import check_verdicts
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, UserError
from store.format.files import check_writable
from trainer.config import Config, StudentConfig
from trainer.parallel.world import World
from trainer.run.prompts import checked_prompts, held_out_problems, training_problems
from trainer.run.resume import check_data, find_start
from trainer.run.run_dir import Position, RunFiles
from trainer.run.saved_model import check_model
from trainer.run.setup import (
    check_choices,
    check_tokenizers,
    covered,
    fingerprint_of,
    open_store,
    reads_store,
    usable_traces,
)
from trainer.student.adapters import over_base
from trainer.student.head import SLICE_VALUES
from trainer.student.load import compute_dtype, load_tokenizer, naming_the_model, pick_device
from trainer.telemetry.console import TrainReporter

T = TypeVar("T")

USABLE_SHARE = 0.9
"""Share of a card's memory that tensors can use: the CUDA context and fragmentation take the rest."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Bytes of optimizer state on the device per trained weight; pages move to the host when it is full."""
HIDDEN_BYTES = 34
"""Bytes that a layer keeps for the backward pass per token and hidden unit, counted on real layers."""
SLICES = 3
"""Tensors of the size of one slice of logits that exist at once in its backward pass."""
NF4_BYTES = 4.127 / 8
"""Bytes of a 4-bit weight, its share of the scales included (QLoRA, section 3)."""
REMEDIES = {
    "vLLM": "rollout.vllm_gpu_memory_utilization, or servers in rollout.base_urls",
    "activations": "student.gradient_checkpointing=true, train.max_tokens_per_microbatch",
    "KV cache": "rollout.batch_size, or rollout.engine=vllm",
    "optimizer": "train.optim=adamw_8bit, paged_adamw_8bit (one GPU), torchrun (more), student.use_peft=true",
    "gradients": "torchrun (more GPUs), student.use_peft=true",
    "reference": "train.beta=0",
    "weights": "torchrun (more GPUs), student.use_peft=true (then student.load_in_4bit=true)",
}
"""Part of the peak -> the keys that reduce it, those that leave the result unchanged first."""

MemoryPlan = dict[str, dict[str, int]]
"""`update` and `sampling`, which never overlap -> part -> bytes on each device."""


def dry_run(
    config: Config,
    *,
    gpu: str = "",
    processes: int = 1,
    resume: str = "auto",
    changed_store: bool = False,
) -> tuple[Group, list[UserError]]:
    """Returns what a run would do, and the errors of missing problems, store or student.

    Raises everything else that would end the run before its first step, except what needs the weights or the
    traces.

    Args:
        gpu: the card to plan for, with its size in the name; empty: the local device.
        processes: number of GPUs that share the run.
        resume, changed_store: as those of `train`.
    """
    card_bytes = card_memory(gpu, config.student)
    check_choices(config, World(size=processes))
    run = RunFiles(Path(config.run.dir).absolute() / config.run.name)
    check_writable(run.root, named="the run")
    start_from = find_start(run, config, resume, checksums=True)
    after = "would start" if start_from is None else f"would resume after {Position.of(start_from)}"
    lines = [f"run {run.root}: {after}, up to step {config.train.max_steps}"]
    reporter, missing = TrainReporter(), list[UserError]()
    student = _check(config, start_from, changed_store, lines, missing, reporter)
    lines += [f"warning: {text}" for text in reporter.warnings]
    if not student:
        lines.append("no memory plan: the student's config.json cannot be read")
    plan = memory_report(config, student[1], card_bytes, processes) if student else ()
    return Group(Text("\n".join(lines)), *plan), missing


def _check(
    config: Config,
    start: Path | None,
    changed_store: bool,
    lines: list[str],
    missing: list[UserError],
    reporter: TrainReporter,
) -> tuple[Any, Any] | None:
    """Checks problems, store and prompts as a run does; adds what it finds to `lines` and `missing`.

    Returns the student's tokenizer and model, None where they cannot be read.
    """

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            missing.append(error)
            return None

    with ExitStack() as stack:
        verifier = stack.enter_context(Verifier(config.verify))
        problems = attempt(lambda: training_problems(config, verifier, reporter)) or ()
        held_out = attempt(lambda: held_out_problems(config, verifier, reporter)) or {}
        store = attempt(lambda: open_store(config, stack))
        student = attempt(lambda: read_student(config.student))
        counts = [f"{len(each):,} held-out problems {name}".rstrip() for name, each in held_out.items()]
        lines.append(", ".join([f"{len(problems):,} training problems", *counts]))
        if store is not None:
            check_verdicts(store.path, problems, verifier)
            lines.append(f"{covered(store, problems, config)} problems have a verified trace in the store")
        if problems and (store is not None or not reads_store(config)):
            usable = usable_traces(config, store, problems, reporter)
            if start is not None:
                fingerprint = fingerprint_of(problems)
                check_data(start, fingerprint, usable, changed_store=changed_store, reporter=reporter)
        if student and store and config.guidance.reads_teacher_logprobs:
            check_tokenizers(store.teachers(), tokenizer_fingerprint(student[0]), config.guidance.teachers)
        if student and problems:
            tokenizer, model = student
            prompts = attempt(
                lambda: checked_prompts(config, problems, held_out, tokenizer, model.config, reporter)
            )
            if prompts:
                check_form(config.student, problems[0], key="student.answer_form")
                first = prompts[0][0]
                lines += [f"first prompt:\n{first.text}", f"its answer in the form {first.answer_form}"]
    return student


def read_student(student: StudentConfig) -> tuple[Any, Any]:
    """Returns the tokenizer and the model, on the meta device; EngineError when one cannot be read."""
    check_model(student)
    tokenizer = load_tokenizer(student)
    student, _ = over_base(student)
    with naming_the_model(student.model), torch.device("meta"):
        model_config = AutoConfig.from_pretrained(student.model, revision=student.revision)
        return tokenizer, AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]


def card_memory(gpu: str, student: StudentConfig) -> int | None:
    """Returns the bytes of the card `gpu`, by default the local one; None on the CPU."""
    if gpu:
        if size := re.search(r"(\d+)GB$", gpu):
            return int(size[1]) * 10**9
        raise ConfigError(f"--gpu {gpu!r}: end the name with the card's memory, e.g. H100-80GB")
    device = pick_device(student.device)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def plan_memory(
    config: Config, model: Any, *, width: int, processes: int = 1, card_bytes: int = 0
) -> MemoryPlan:
    """Returns the bytes of each part per device.

    Args:
        model: the student, on the meta device.
        width: bytes of a value in the compute dtype, 2 or 4.
        processes: number of GPUs that weights, gradients, optimizer state and samples are sharded over.
    """
    student, train, rollout, text = (
        config.student,
        config.train,
        config.rollout,
        model.config.get_text_config(),
    )
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    linear, everything = sum(layer.weight.numel() for layer in layers), model.num_parameters()
    outside = everything - linear  # embedding, head and norms, which are never in 4 bits
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_values = 2 * kv_heads * head_size  # of a layer and token
    mlp_width = max((layer.out_features for layer in layers), default=4 * text.hidden_size)
    if student.use_peft:  # an adapter of rank r has r parameters for each input and output of its layer
        trained = student.lora_r * sum(layer.in_features + layer.out_features for layer in layers)
        frozen = round((NF4_BYTES if student.load_in_4bit else width) * linear) + width * outside
    else:  # on one GPU autocast makes copies
        trained, frozen = everything, width * everything if width < 4 and processes == 1 else 0
    optimizers = 2 if config.guidance.place == "buffer" else 1  # the buffer has one of its own
    always = {
        "weights": (4 * trained + frozen) // processes,
        "optimizer": optimizers * OPTIMIZER_BYTES[train.optim] * trained // processes,
        "reference": 4 * everything // processes if train.beta > 0 and not student.use_peft else 0,
    }
    kept = width if student.use_peft else 4  # autocast over float32 weights keeps hidden states in float32
    longest = rollout.max_prompt_length + rollout.max_completion_length
    tokens = max(train.max_tokens_per_microbatch, longest)
    of_layer = HIDDEN_BYTES * text.hidden_size + width * (4 * mlp_width + kv_values)
    if student.gradient_checkpointing:  # its input; computing it again takes less than the head
        of_layer = kept * text.hidden_size
    update = {
        "gradients": 4 * trained // processes,
        "activations": text.num_hidden_layers * tokens * of_layer,
        # Slices, float32 hidden states and their gradient, and the gradient of a head that trains.
        "head": SLICES * 4 * min(SLICE_VALUES["cuda"], tokens * text.vocab_size)
        + 2 * 4 * tokens * text.hidden_size
        + (0 if student.use_peft else 4 * text.vocab_size * text.hidden_size),
    }
    sampling = {}
    if processes > 1:  # two layers at a time in the update, all of them while a rank samples or scores
        update["gathered weights"] = 2 * outside + 2 * 4 * linear // text.num_hidden_layers
        sampling["gathered weights"] = width * linear + 4 * outside
    if rollout.engine == "transformers":
        rows = min(rollout.batch_size, -(-train.problems_per_step * rollout.num_generations // processes))
        sampling["KV cache"] = rows * longest * text.num_hidden_layers * kv_values * kept
    elif not rollout.base_urls:  # vLLM sleeps while a rank scores or updates
        sampling = {"vLLM": round(rollout.vllm_gpu_memory_utilization * card_bytes)}
    return {"update": always | update, "sampling": always | sampling}


def memory_report(config: Config, model: Any, card_bytes: int | None, processes: int) -> tuple[Table, Text]:
    """Returns memory per part and phase, the peak, and what reduces it."""
    device = torch.device("cpu" if card_bytes is None else "cuda")
    width = compute_dtype(config.student, device).itemsize
    plan = plan_memory(config, model, width=width, processes=processes, card_bytes=card_bytes or 0)
    columns = [Column(phase, justify="right") for phase in plan]
    title = f"memory of a step, {model.num_parameters():,} parameters"
    table = Table("MiB on each device", *columns, title=title)
    for part in plan["update"] | plan["sampling"]:
        table.add_row(part, *(f"{parts.get(part, 0) / 2**20:,.0f}" for parts in plan.values()))
    at_peak = max(plan.values(), key=lambda parts: sum(parts.values()))
    peak = sum(at_peak.values())
    lines = [f"peak {peak / 2**20:,.0f} MiB"]
    if card_bytes is not None:
        usable = USABLE_SHARE * card_bytes
        fits = "fits" if peak <= usable else "does not fit"
        lines[0] += f" of {usable / 2**20:,.0f} MiB usable: {fits}"
    largest = sorted(REMEDIES.keys() & at_peak.keys(), key=lambda part: -at_peak[part])
    lines += ["to reduce the largest parts:", *(f"  {part}: {REMEDIES[part]}" for part in largest[:3])]
    return table, Text("\n".join(lines))
