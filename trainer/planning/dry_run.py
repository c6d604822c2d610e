"""`ampo train --dry-run`: checks everything, shows prompt, memory and time, touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from precompute.engines.checks import stop_ids_of
from precompute.problems.prompts import tokenizer_fingerprint, turn_end
from precompute.verify.verifier import Verifier
from store.errors import UserError
from store.reader import TraceStore
from store.records import Problem
from trainer.config import Config
from trainer.method.rollouts import Prompt, demanded_form
from trainer.method.sft import find_lessons
from trainer.method.teacher_traces import TraceTokens, check_tokenizers
from trainer.parallel.fsdp import check_shardable
from trainer.parallel.world import World
from trainer.planning.estimate import (
    Estimate,
    ModelShape,
    estimate,
    load_model_config,
    loaded_bytes,
    shape_of,
)
from trainer.planning.fitting import Proposal, proposal
from trainer.planning.hardware import Device, at_hand, card
from trainer.planning.known_shapes import known_config
from trainer.run.checkpoint import check_config, read_state
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import (
    asks_store,
    check_plan,
    covered,
    fitting_prompts,
    open_store,
    usable_problems,
    warn_of_prompts,
)
from trainer.sampling.samplers import check_sampler
from trainer.student.model_check import check_model
from trainer.student.policy import compute_dtype, load_tokenizer, pick_device
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.trackers import Trackers
from trainer.train import find_start

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a run would do, and what it could not begin without."""

    report: Group
    missing: tuple[UserError, ...]
    """What a run would end with before its first step; the plan is told all the same."""


def dry_run_of(config: Config, *, gpu: str = "", processes: int = 1) -> DryRun:
    """Everything that `ampo train` would check, and what it would then do. Raises what the config and the run
    that is there rule out; what problems, traces and student do not bear is told beside the plan.

    Args:
        gpu: the card to plan for, by name; empty: the device at hand.
        processes: how many of them.
    """
    planned_for = card(gpu) if gpu else None
    check_sampler(config)
    check_shardable(config, World(size=processes))
    run = RunFiles(Path(config.run.dir).absolute() / config.run.name)
    run.check_writable()
    start_from = find_start(run, config, "auto")
    if start_from is not None:
        check_config(read_state(start_from), config, start_from)
    reporter = TrainReporter()
    with ExitStack() as stack:
        stack.enter_context(Trackers(config.run.report_to))
        there = _look(config, reporter, stack)
        prompt = there.tried(lambda: _check_prompts(config, there, reporter)) or []
    lines = [
        *(f"warning: {warning}" for warning in reporter.warnings),
        *there.told(config),
        _start_line(config, run, start_from),
    ]
    plan: Sequence[Table | Text] = [
        Text(f"no plan of memory and time: the shape of {config.student.model!r} is not known")
    ]
    if there.model_config is not None:
        plan = estimate_of(config, there.model_config, planned_for, processes)
    return DryRun(report=Group(Text("\n".join(lines)), *prompt, *plan), missing=tuple(there.missing))


@dataclass(slots=True)
class _There:
    """What a run would read; None where it is missing."""

    problems: list[Problem] | None = None
    held_out: list[Problem] | None = None
    store: TraceStore | None = None
    known: int | None = None
    """Problems with a verified trace in the store."""
    tokenizer: Any = None
    model_config: Any = None
    """For its shape alone where the model is not there."""
    missing: list[UserError] = field(default_factory=list)

    def tried(self, look: Callable[[], T]) -> T | None:
        """What `look` gives; None, and a note, where it is missing."""
        try:
            return look()
        except UserError as error:
            self.missing.append(error)
            return None

    def told(self, config: Config) -> list[str]:
        lines = []
        if self.problems is not None and self.held_out is not None:
            lines.append(f"{len(self.problems)} training problems, {len(self.held_out)} held out")
        if not asks_store(config):
            lines.append("no store is asked")
        if self.known is not None:
            lines.append(f"{self.known} problems have a verified trace in the store")
        return lines


def _look(config: Config, reporter: TrainReporter, stack: ExitStack) -> _There:
    there, student = _There(), config.student
    verifier = stack.enter_context(Verifier.configured(config.verify))
    there.problems = there.tried(lambda: usable_problems(config, "train", verifier, reporter))
    there.held_out = []
    if config.eval.every:
        there.held_out = there.tried(lambda: usable_problems(config, "eval", verifier, reporter))
    there.store = there.tried(lambda: open_store(config, stack))
    if there.store is not None and there.problems is not None:
        there.known = covered(there.store, there.problems, config)
    there.tokenizer = there.tried(lambda: _tokenizer(config))
    there.model_config = (
        load_model_config(student) if there.tokenizer is not None else known_config(student.model)
    )
    return there


def _tokenizer(config: Config) -> Any:
    check_model(config.student)
    return load_tokenizer(config.student)


def _check_prompts(config: Config, there: _There, reporter: TrainReporter) -> list[Text]:
    """Checks what belongs together, where it is there; the first prompt as the student sees it."""
    if there.problems is None or there.tokenizer is None:
        return []
    prompts = fitting_prompts(config, there.problems, there.tokenizer, reporter)
    held_out = fitting_prompts(config, there.held_out, there.tokenizer, reporter) if there.held_out else []
    warn_of_prompts(config, there.tokenizer, prompts, reporter)
    check_plan(config, prompts, held_out, there.model_config, reporter)
    if there.store is not None:
        _check_traces(config, there, prompts)
    form = demanded_form(config.student, there.problems)
    return [
        Text(f"final answers in the form {form}; first prompt ({len(prompts[0].ids)} tokens):"),
        Text(prompts[0].text, style="cyan"),
    ]


def _check_traces(config: Config, there: _There, prompts: Sequence[Prompt]) -> None:
    """That the store's traces bear what the config wants of them."""
    assert there.store is not None
    if config.guidance.ratio == "teacher":
        fingerprint = tokenizer_fingerprint(there.tokenizer)
        check_tokenizers(there.store.teachers(), fingerprint, config.guidance.teachers)
    if config.warmup.sft_steps:
        student = config.student
        ends = stop_ids_of(student.model, student.revision, there.tokenizer)
        tokens = _Tokens(there.tokenizer, ends, turn_end(there.tokenizer, ends))
        form = demanded_form(student, [prompt.problem for prompt in prompts])
        find_lessons(config, there.store, TraceTokens(tokens, form, own_ids=False), prompts)


@dataclass(slots=True)
class _Tokens:
    """What a loaded student would know of its tokens."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    eos_id: int


def _start_line(config: Config, run: RunFiles, start_from: Path | None) -> str:
    if start_from is not None:
        done = Position.of(start_from)
        return f"run {run.root}: would go on after {done}, to step {config.train.max_steps}"
    warmup = f"{config.warmup.sft_steps} supervised and " if config.warmup.sft_steps else ""
    return f"run {run.root}: would start, {warmup}{config.train.max_steps} sampling steps"


def estimate_of(
    config: Config, model_config: Any, planned_for: Device | None, processes: int
) -> tuple[Table, Text]:
    """Memory by part, the peak, a lower bound of a step's time, and what to change where it does not fit."""
    shape = shape_of(model_config)
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
    table.add_row("peak (sampling, scoring and update do not overlap)", _mib(found.peak))
    table.add_row("that tensors can have", "-" if device.memory is None else _mib(device.memory))
    lines = [_time_line(config, found), f"most of the peak: {found.dominant}"]
    if processes > 1:
        whole = _mib(loaded_bytes(config.student, shape, width))
        lines.append(f"host memory to load: {whole} MiB in the first process, a share in the others")
    if device.memory is not None:
        better = proposal(config, shape, device, bytes_per_value=width, processes=processes)
        lines.append(_fit_line(better, device, processes))
    return table, Text("\n".join(lines))


def _title(shape: ModelShape, device: Device, processes: int) -> str:
    each = f", in each of {processes} processes" if processes > 1 else ""
    return f"one step of {shape.parameters:,} parameters on {device.name}{each}"


def _time_line(config: Config, found: Estimate) -> str:
    supervised = config.warmup.sft_steps * found.supervised_seconds
    hours = (found.seconds * config.train.max_steps + supervised) / 3600
    before = f"; {found.supervised_seconds:.2g} s a supervised step" if config.warmup.sft_steps else ""
    return (
        f"at least {found.seconds:.2g} s a step if every response has full length: sampling "
        f"{found.sampling_seconds:.2g} s, update {found.update_seconds:.2g} s{before}; {hours:.2g} h in all"
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
