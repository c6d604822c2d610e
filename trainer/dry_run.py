"""`ampo train --dry-run`: checks everything, shows prompt, memory and time, touches nothing."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from precompute.prompts import tokenizer_fingerprint
from precompute.verify import Verifier
from trainer.assemble import (
    SilentReporter,
    check_plan,
    covered,
    open_store,
    usable_problems,
    warn_of_prompts,
)
from trainer.checkpoint import check_config, read_state
from trainer.config import Config
from trainer.distributed import World
from trainer.estimate import Estimate, ModelShape, estimate, load_model_config, shape_of
from trainer.fitting import Proposal, proposal
from trainer.hardware import Device, at_hand, card
from trainer.loop import find_start
from trainer.model_check import check_model
from trainer.policy import compute_dtype, load_tokenizer, pick_device
from trainer.rollout import demanded_form, student_prompts
from trainer.run_files import Position, RunFiles
from trainer.sampler import check_sampler
from trainer.sharding import check_shardable
from trainer.traces import check_tokenizers
from trainer.trackers import Trackers


def dry_run_of(config: Config, *, gpu: str = "", processes: int = 1) -> Group:
    """Everything that `ampo train` would check, and what it would then do. Raises what it would raise.

    Args:
        gpu: the card to plan for, by name; empty: the device at hand.
        processes: how many of them.
    """
    planned_for = card(gpu) if gpu else None
    check_sampler(config)
    check_shardable(config, World(size=processes))
    check_model(config.student)
    run = RunFiles(Path(config.run.dir).absolute() / config.run.name)
    run.check_writable()
    start_from = find_start(run, config, "auto")
    if start_from is not None:
        check_config(read_state(start_from), config, start_from)
    with ExitStack() as stack:
        stack.enter_context(Trackers(config.run.report_to))
        verifier = stack.enter_context(Verifier.configured(config.verify))
        reporter = SilentReporter()
        problems = usable_problems(config, "train", verifier, reporter)
        held_out = usable_problems(config, "eval", verifier, reporter) if config.eval.every else []
        store = open_store(config, stack)
        known = None if store is None else covered(store, problems, config)
        tokenizer = load_tokenizer(config.student)
        if store is not None and config.guidance.ratio == "teacher":
            check_tokenizers(store.teachers(), tokenizer_fingerprint(tokenizer), config.guidance.teachers)
    longest = config.rollout.max_prompt_length
    prompts, too_long = student_prompts(problems, tokenizer, config.student, max_prompt_length=longest)
    held_out_prompts = (
        student_prompts(held_out, tokenizer, config.student, max_prompt_length=longest)[0] if held_out else []
    )
    warn_of_prompts(config, tokenizer, prompts, reporter)
    check_plan(config, prompts, held_out_prompts, load_model_config(config.student), reporter)
    form = demanded_form(config.student, problems)
    lines = [
        *(f"warning: {warning}" for warning in reporter.warnings),
        f"{len(prompts)} training problems ({too_long} too long), {len(held_out)} held out",
        f"final answers in the form {form}",
        "no store is asked" if known is None else f"{known} problems have a verified trace in the store",
        _start_line(config, run, start_from),
    ]
    return Group(
        Text("\n".join(lines)),
        Text(f"first prompt ({len(prompts[0].ids)} tokens):"),
        Text(escape(prompts[0].text), style="cyan"),
        *estimate_of(config, planned_for, processes),
    )


def _start_line(config: Config, run: RunFiles, start_from: Path | None) -> str:
    if start_from is not None:
        done = Position.of(start_from)
        return f"run {run.root}: would go on after {done}, to step {config.train.max_steps}"
    warmup = f"{config.warmup.sft_steps} supervised and " if config.warmup.sft_steps else ""
    return f"run {run.root}: would start, {warmup}{config.train.max_steps} sampling steps"


def estimate_of(config: Config, planned_for: Device | None, processes: int) -> tuple[Table, Text]:
    """Memory by part, the peak, a lower bound of a step's time, and what to change where it does not fit."""
    shape = shape_of(load_model_config(config.student))
    place = torch.device("cuda") if planned_for else pick_device(config.student.device)
    dtype = compute_dtype(config.student, place)
    device = planned_for or at_hand(config.student.device, dtype)
    width = dtype.itemsize
    found = estimate(config, shape, device, bytes_per_value=width, processes=processes)
    table = Table(title=_title(shape, device, processes), title_justify="left")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for part, size in sorted(found.memory.items(), key=lambda item: -item[1]):
        if size:
            table.add_row(part, _mib(size))
    table.add_section()
    table.add_row("peak (sampling and update do not overlap)", _mib(found.peak))
    table.add_row("that tensors can have", "-" if device.memory is None else _mib(device.memory))
    lines = [_time_line(config, found), f"most of the peak: {found.dominant}"]
    if device.memory is not None:
        better = proposal(config, shape, device, bytes_per_value=width, processes=processes)
        lines.append(_fit_line(better, device, processes))
    return table, Text("\n".join(lines))


def _title(shape: ModelShape, device: Device, processes: int) -> str:
    each = f", in each of {processes} processes" if processes > 1 else ""
    return f"one step of {shape.parameters:,} parameters on {device.name}{each}"


def _time_line(config: Config, found: Estimate) -> str:
    hours = found.seconds * config.train.max_steps / 3600
    return (
        f"at least {found.seconds:.2g} s a step if every response has full length: sampling "
        f"{found.sampling_seconds:.2g} s, update {found.update_seconds:.2g} s; {hours:.2g} h in all"
    )


def _fit_line(better: Proposal | None, device: Device, processes: int) -> str:
    """Whether it fits, and the changes under which it does."""
    if better is None:
        return f"does not fit {device.name}, and no setting was found that does: take a smaller student"
    changes = [f"--set {key}={_toml(value)}" for key, value in better.changes.items()]
    if better.processes != processes:
        changes.append(f"--processes {better.processes}")
    if not changes:
        return f"fits {device.name}"
    found = better.estimate
    return (
        f"does not fit {device.name}; this does: {' '.join(changes)} "
        f"(peak {_mib(found.peak)} MiB, {found.seconds:.2g} s a step)"
    )


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
