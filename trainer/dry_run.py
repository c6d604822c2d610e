"""`ampo train --dry-run`: checks everything, shows prompt, memory and time, touches nothing."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from precompute.verify import Verifier
from trainer.assemble import (
    SilentReporter,
    check_plan,
    covered,
    open_store,
    usable_problems,
    warn_of_prompts,
)
from trainer.checkpoint import checkpoints
from trainer.config import Config
from trainer.estimate import Estimate, estimate, load_model_config, measured_flops, shape_of
from trainer.policy import compute_dtype, load_tokenizer, pick_device
from trainer.rollout import demanded_form, student_prompts
from trainer.run_files import Position
from trainer.sampler import check_sampler
from trainer.trackers import Trackers


def dry_run_of(config: Config) -> Group:
    """Everything that `ampo train` would check, and what it would then do. Raises what it would raise."""
    check_sampler(config)
    with ExitStack() as stack:
        stack.enter_context(Trackers(config.run.report_to))
        verifier = stack.enter_context(Verifier.configured(config.verify))
        reporter = SilentReporter()
        problems = usable_problems(config, "train", verifier, reporter)
        held_out = usable_problems(config, "eval", verifier, reporter) if config.eval.every else []
        store = open_store(config, stack)
        known = None if store is None else covered(store, problems, config)
    tokenizer = load_tokenizer(config.student)
    prompts, too_long = student_prompts(
        problems, tokenizer, config.student, max_prompt_length=config.rollout.max_prompt_length
    )
    warn_of_prompts(config, tokenizer, prompts, reporter)
    check_plan(config, prompts, [], load_model_config(config.student), reporter)
    form = demanded_form(config.student, problems)
    lines = [
        *(f"warning: {warning}" for warning in reporter.warnings),
        f"{len(prompts)} training problems ({too_long} too long), {len(held_out)} held out",
        f"final answers in the form {form}",
        "no store is asked" if known is None else f"{known} problems have a verified trace in the store",
        _start_line(config),
    ]
    return Group(
        Text("\n".join(lines)),
        Text(f"first prompt ({len(prompts[0].ids)} tokens):"),
        Text(escape(prompts[0].text), style="cyan"),
        estimate_table(config),
    )


def _start_line(config: Config) -> str:
    run = Path(config.run.dir).absolute() / config.run.name
    there = checkpoints(run / "checkpoints")
    if there:
        return f"run {run}: would go on after {Position.of(there[-1])}, to step {config.train.max_steps}"
    warmup = f"{config.warmup.sft_steps} supervised and " if config.warmup.sft_steps else ""
    return f"run {run}: would start, {warmup}{config.train.max_steps} sampling steps"


def estimate_table(config: Config) -> Table:
    """Memory by part, the peak, and a lower bound of a step's time on this device."""
    shape = shape_of(load_model_config(config.student))
    device = pick_device(config.student.device)
    dtype = compute_dtype(config.student, device)
    found = estimate(
        config,
        shape,
        flops=measured_flops(config.student.device, dtype),
        bytes_per_value=dtype.itemsize,
    )
    table = Table(title=f"one step of {shape.parameters:,} parameters on {device}", title_justify="left")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for part, size in sorted(found.memory.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{size / 2**20:,.1f}")
    table.add_section()
    table.add_row("peak (sampling and update do not overlap)", f"{found.peak / 2**20:,.1f}")
    table.add_row("of the device's", _device_memory(device))
    table.caption = _time_line(config, found)
    return table


def _time_line(config: Config, found: Estimate) -> str:
    hours = found.seconds * config.train.max_steps / 3600
    return f"at least {found.seconds:.2g} s a step if every response has full length; {hours:.2g} h in all"


def _device_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return "-"
    return f"{torch.cuda.get_device_properties(device).total_memory / 2**20:,.1f}"
