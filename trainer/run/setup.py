"""Sets up a run: loads and checks everything a step needs, before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from precompute.engines.decoding import control_tokens
from precompute.problems.prompts import check_form, tokenizer_fingerprint, turn_end_warning
from precompute.run.reverify import check_verdicts
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError, StoreError, TrainingError, install_hint
from store.reader import TraceStore, Usable
from store.records import Problem, TeacherRecord, Trace, content_hash
from store.registry import lookup
from store.reports.report import problem_rows
from trainer.buffer import TraceBuffer
from trainer.config import Config
from trainer.inserts import Inserter
from trainer.method.groups import REWARDS, Group, Prompt, Rewarder
from trainer.method.guidance import SELECTORS, TRIGGERS, Guide
from trainer.method.loss import make_policy_loss
from trainer.method.sft import Sft
from trainer.method.teacher_traces import TraceReader
from trainer.method.update import Updater
from trainer.parallel.fsdp import check_shardable, initial_device, shard
from trainer.parallel.world import ALONE, World
from trainer.run.prompts import checked_prompts, held_out_problems, longest_prompt, training_problems
from trainer.run.run_dir import Position, RunFiles
from trainer.run.saved_model import check_model
from trainer.sampling.samplers import check_sampler, make_sampler
from trainer.student.adapters import adapter_settings
from trainer.student.batches import token_batch
from trainer.student.load import load_policy
from trainer.student.optimizer import make_optimizer
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.variants import SUPERVISED

OnStep = Callable[[Mapping[str, Any]], object]
"""Called on rank 0 with every row of metrics.jsonl, as it is written."""
OnGroup = Callable[[int, Group], object]
"""Called on rank 0 with the step and each of its groups, as it trained."""


class Run:
    """A run that trains: everything a step needs, and the progress."""

    def __init__(
        self,
        config: Config,
        files: RunFiles,
        weights: Path | None,
        reporter: TrainReporter,
        stack: ExitStack,
        world: World = ALONE,
    ) -> None:
        """Loads and checks all parts. `weights`: checkpoint to resume from; `stack` closes what is opened."""
        check_choices(config, world)
        self.config, self.files, self.reporter, self.world = config, files, reporter, world
        self.done = Position()
        self.saved: Path | None = None
        """The last checkpoint."""
        self.trackers: list[Any] = []
        self.on_step: OnStep = lambda row: None
        self.on_group: OnGroup = lambda step, group: None
        verifier = stack.enter_context(Verifier(config.verify))
        problems = training_problems(config, verifier, reporter)
        held_out = held_out_problems(config, verifier, reporter)
        if weights is None or config.student.use_peft:
            check_model(config.student)
        store = open_store(config, stack)
        torch.manual_seed(config.train.seed)  # new adapters begin at random
        self.policy = policy = load_student(config, world, weights)
        if warning := turn_end_warning(policy.tokenizer, policy.eos_ids):
            reporter.warned(warning)
        self.train_prompts, self.eval_prompts = checked_prompts(
            config, problems, held_out, policy.tokenizer, policy.model.config, reporter
        )
        held = [prompt for prompts in self.eval_prompts.values() for prompt in prompts]
        check_embedded((*self.train_prompts, *held), policy)
        check_form(config.student, problems[0], key="student.answer_form")
        length = config.rollout.max_completion_length
        self.rewarder = Rewarder(verifier, weights=config.rewards, max_length=length)
        traces = None if store is None else trace_reader(config, store, policy, reporter)
        if store is not None and traces is not None:
            check_store(config, store, traces, self.train_prompts, verifier, reporter)
        self.problems_fingerprint = fingerprint_of(problems)
        self.usable = usable_traces(config, store, problems, reporter)
        """teacher -> usable traces of the training problems; empty where the store is not read."""
        shard(policy, world)
        longest = longest_prompt(config, (*self.train_prompts, *held))
        self.sampler = make_sampler(config, policy, longest, files.root, stack, world)
        self.optimizer = make_optimizer(policy.model, config.train)
        self.updater = make_updater(config, policy, self.optimizer, world)
        if policy.device.type == "cuda":
            longest += config.rollout.max_completion_length
            max_tokens = config.train.max_tokens_per_microbatch
            copies = 4 if config.guidance.place == "buffer" else 2
            probe_memory(policy, self.optimizer, longest=longest, max_tokens=max_tokens, copies=copies)
        on_problem = partial(reporter.progress, "traces for SFT")
        self.sft = Sft(config, policy, traces, self.train_prompts, on_problem, world)
        self.buffer = TraceBuffer(config, self.sft) if config.guidance.place == "buffer" else None
        inserter = None
        if config.guidance.insert != "trace":
            inserter = Inserter(config, policy, self.sampler, self.rewarder)
        self.guide = Guide(config, traces, policy, self.rewarder, inserter)

    @property
    def last_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that took the last step: SFT has its own."""
        return self.sft.optimizer if self.done.step == 0 and self.done.sft_step else self.optimizer


def check_choices(config: Config, world: World) -> None:
    """Raises ConfigError for unknown triggers, selectors, losses and rewards, and for keys that conflict;
    EngineError for a tracker that is not installed."""
    make_policy_loss(config.train, config.guidance)
    lookup(TRIGGERS, config.guidance.trigger, key="guidance.trigger")
    lookup(SELECTORS, config.guidance.select, key="guidance.select")
    for name in config.rewards:
        lookup(REWARDS, name, key="rewards")
    for name in config.run.report_to:
        if find_spec(name) is None:
            raise EngineError(f"run.report_to: {name!r} is not installed; {install_hint(name)} installs it")
    check_sampler(config)
    check_shardable(config, world)


def load_student(config: Config, world: World, weights: Path | None = None) -> Policy:
    """Returns the student, not sharded yet; `weights`: a checkpoint to resume from."""
    return load_policy(
        config.student,
        temperature=config.rollout.temperature,
        weights=weights,
        initial_device=initial_device(world),
    )


def make_updater(config: Config, policy: Policy, optimizer: torch.optim.Optimizer, world: World) -> Updater:
    """Returns the updater of RL; its reference for the KL is the student as it was before training."""
    reference = None
    if config.train.beta and config.student.use_peft and not adapter_settings(config.student.model):
        reference = policy.frozen_logprobs
    elif config.train.beta:
        before = load_student(config, world)
        before.model.requires_grad_(False)
        shard(before, world)
        reference = before.logprobs
    return Updater(
        policy,
        optimizer,
        config.train,
        make_policy_loss(config.train, config.guidance),
        max_completion_length=config.rollout.max_completion_length,
        reference=reference,
        supervised=config.guidance.loss in SUPERVISED,
        world=world,
    )


def reads_store(config: Config) -> bool:
    """Returns whether a run reads the store."""
    return config.guidance.trigger != "never" or config.sft.steps > 0


def open_store(config: Config, stack: ExitStack) -> TraceStore | None:
    """Returns the store if the run reads it. Raises StoreError when a configured teacher is not in it."""
    if not reads_store(config):
        return None
    store = stack.enter_context(TraceStore(config.store.path))
    known = sorted(store.teachers())
    for name in config.guidance.teachers:
        if name not in known:
            raise StoreError(
                f"guidance.teachers names {name!r}; {store.path} has: {', '.join(known) or 'none'}"
            )
    return store


def check_store(
    config: Config,
    store: TraceStore,
    traces: TraceReader,
    prompts: Sequence[Prompt],
    verifier: Verifier,
    reporter: TrainReporter,
) -> None:
    """Warns when the store knows few of the problems; refuses verdicts of another verifier, and traces that
    `shaped_ratio` cannot use."""
    check_verdicts(store.path, [prompt.problem for prompt in prompts], verifier)
    if config.guidance.reads_teacher_logprobs:
        fingerprint = tokenizer_fingerprint(traces.student.tokenizer)
        check_tokenizers(store.teachers(), fingerprint, config.guidance.teachers)
        for _ in traces.all_candidates(prompts):  # raises for the first trace that does not fit
            pass
    known = covered(store, [prompt.problem for prompt in prompts], config)
    if known < len(prompts) / 2:
        reporter.warned(
            f"{store.path} has verified traces of {known} of {len(prompts)} training problems: is it the "
            "right store? Where all samples of another problem fail, nothing is learnt"
        )
    for part in store.damaged:
        reporter.warned(f"{part.part} cannot be read ({part.reason}); its traces are left out")


def fingerprint_of(problems: Sequence[Problem]) -> str:
    """Returns the content hash of the problems, in order."""
    return content_hash([problem.problem_id for problem in problems])


def usable_traces(
    config: Config, store: TraceStore | None, problems: Sequence[Problem], reporter: TrainReporter
) -> dict[str, Usable]:
    """Returns teacher -> its usable traces of the problems, {} without a store.

    Warns of teachers whose traces are used although the config has no [[teachers]] table of their name.
    """
    if store is None:
        return {}
    ids = [problem.problem_id for problem in problems]
    usable = store.usable(ids, teachers=config.guidance.teachers or None)
    named = {teacher.name for teacher in config.teachers}
    others = sorted(usable.keys() - named)
    if others and (mine := sorted(usable.keys() & named)) and not config.guidance.teachers:
        reporter.warned(
            f"the store's traces of {', '.join(others)} are used too, which no [[teachers]] table names; "
            f"guidance.teachers = {json.dumps(mine)} leaves them out"
        )
    return usable


def covered(store: TraceStore, problems: Sequence[Problem], config: Config) -> int:
    """Returns the number of problems with a usable trace of a configured teacher."""
    teachers = {row["problem_id"]: set(row["teachers"]) for row in problem_rows(store)}
    wanted = set(config.guidance.teachers or store.teachers())
    return sum(not wanted.isdisjoint(teachers.get(problem.problem_id, ())) for problem in problems)


def check_tokenizers(
    teachers: Mapping[str, TeacherRecord], student_fingerprint: str, used: Sequence[str]
) -> None:
    """Raises StoreError unless every used teacher has the student's tokenizer: `shaped_ratio` compares
    probabilities of the same tokens."""
    for name in used or sorted(teachers):
        if teachers[name].tokenizer_fingerprint != student_fingerprint:
            raise StoreError(
                f'guidance.loss = "shaped_ratio" needs the student\'s tokenizer in every teacher, and '
                f'{name!r} ({teachers[name].model}) has another; use guidance.loss = "shaped"'
            )


def trace_reader(config: Config, store: TraceStore, policy: Policy, reporter: TrainReporter) -> TraceReader:
    """Returns the reader of the store's traces, in the tokens that `guidance.loss` needs."""
    refused: set[str] = set()

    def on_refused(trace: Trace, token: str) -> None:
        is_new = trace.trace_id not in refused
        refused.add(trace.trace_id)
        if is_new and str(len(refused)).rstrip("0") == "1":  # 1, 10, 100, ...
            reporter.warned(
                f"{len(refused)} traces hold control tokens of the student and are left out, e.g. "
                f"{trace.trace_id} of {trace.teacher}: {token}"
            )

    tokenizer, unknown = policy.tokenizer, policy.tokenizer.unk_token
    control = control_tokens(tokenizer) | not_embedded(policy)
    return TraceReader(
        control={token: index for token, index in control.items() if token != unknown},
        on_refused=on_refused,
        store=store,
        student=policy,
        teachers=config.guidance.teachers,
        max_length=config.rollout.max_completion_length,
        own_ids=config.guidance.reads_teacher_logprobs,
    )


def not_embedded(policy: Policy) -> dict[str, int]:
    """Returns token -> id of the tokens that were added to the tokenizer and not to the embedding."""
    rows = policy.causal.config.get_text_config().vocab_size
    added = policy.tokenizer.added_tokens_decoder
    return {str(token): index for index, token in added.items() if index >= rows}


def check_embedded(prompts: Sequence[Prompt], policy: Policy) -> None:
    """Raises ConfigError for a prompt with a token that the student's embedding lacks."""
    for token, index in not_embedded(policy).items():
        if found := next((prompt for prompt in prompts if index in prompt.ids), None):
            raise ConfigError(
                f"student.model: the prompt of {found.problem.problem_id} holds {token!r} ({index}), which "
                "was added to the tokenizer and not to the embedding: leave it out of chat_template and "
                "system_prompt, or give a model that was resized"
            )


def probe_memory(
    policy: Policy, optimizer: torch.optim.Optimizer, *, longest: int, max_tokens: int, copies: int = 2
) -> None:
    """Trains on the largest micro-batch once, without an effect on weights, gradients or generators.

    All ranks have to call it. Raises TrainingError when the device has too little memory.

    Args:
        longest: prompt and response tokens of the longest sequence.
        max_tokens: `train.max_tokens_per_microbatch`.
        copies: values that AdamW will have for each weight; it has no state yet.
    """
    ids = torch.full((max(1, max_tokens // longest), longest), policy.pad_id)
    target_mask = torch.ones_like(ids, dtype=torch.bool)
    target_mask[:, 0] = False
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    copies = copies if isinstance(optimizer, torch.optim.AdamW) else 0
    try:
        with explain_memory(f"trying a micro-batch of {len(ids)} x {longest} tokens"):
            held = [torch.empty_like(weight) for weight in weights for _ in range(copies)]
            batch = token_batch(ids, target_mask, device=policy.device)
            logprobs, entropy = policy.logprobs_and_entropy(batch)
            ((logprobs + entropy).sum() * 0.0).backward()  # type: ignore[no-untyped-call]
            del held
    finally:
        optimizer.zero_grad(set_to_none=True)


@contextmanager
def explain_memory(doing: str) -> Iterator[None]:
    """Turns a lack of GPU memory into one line that names the ways out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory while {doing}: lower train.max_tokens_per_microbatch or rollout.batch_size "
            "(both leave the result as it is), or set student.gradient_checkpointing = true; "
            "`ampo train --dry-run` shows what takes how much"
        ) from error
