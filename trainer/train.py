"""`ampo train`, top to bottom: SFT, then per step sample, guide, update, sync, log, evaluate, save.

Departures from the paper's published code are in docs/departures.md.

    ampo train --config configs/lab.toml
    ampo train --config configs/lab.toml --set guidance.trigger=never --set run.name=grpo

Under `torchrun` every rank runs this file: it samples and guides its share of a step's problems, and from
there on has all groups. Rank 0 writes and prints.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.evaluation import evaluate
from trainer.method.groups import Group, Prompt
from trainer.method.guidance import QueryRow
from trainer.method.rollouts import problems_of_step, refills_of_step, sample_groups
from trainer.method.update import member_advantages
from trainer.parallel.signals import StopRequest, stop_on_signals
from trainer.parallel.world import ALONE, World
from trainer.run.errors import explain_memory, explain_step
from trainer.run.resume import (
    TrainReport,
    check_unchanged,
    find_complete_start,
    resume_state,
    save_checkpoint,
)
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import Parts, assemble
from trainer.sampling.samplers import check_sampler_weights
from trainer.student.optimizer import learning_rate_at, set_learning_rate
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics, step_metrics
from trainer.telemetry.performance import peak_memory, performance_metrics
from trainer.timing import StepTimer


def train(
    config: Config,
    *,
    resume: str = "auto",
    changed_store: bool = False,
    reporter: TrainReporter,
    world: World = ALONE,
) -> TrainReport:
    """Trains the student; the first Ctrl-C finishes the step, saves, and returns.

    Args:
        resume: `auto` resumes from the run's last checkpoint, if any; `never` refuses a run that exists; else
            the path of a checkpoint.
        changed_store: continue though the store holds other traces than before; the result is another run
            than the uninterrupted one.
        world: the ranks that train together (parallel/world.py); each of them calls this.

    Raises UserError for everything that a user can mend, before the first step.
    """
    run = RunFiles(Path(config.run.dir).absolute() / config.run.name, writes=world.is_main)
    start_from = world.from_main(lambda: find_complete_start(run, config, resume))
    run.check_writable()
    with ExitStack() as stack:
        with explain_memory("setting up the run"):
            parts = assemble(config, run, start_from, reporter, stack, world)
        with explain_memory(f"loading the optimizer of {start_from}"):
            done = resume_state(parts, start_from, changed_store=changed_store)
        stack.enter_context(run.held())
        world.from_main(lambda: check_unchanged(run, config, resume, start_from))
        resumed = start_from is not None and start_from.parent == run.checkpoints
        after = done if resumed else Position()
        run.start(config, after=after, processes=world.size)
        parts.trackers.begin(
            run.root,
            config.model_dump(mode="json"),
            after=(after.step, after.sft_step),
            sft_steps=config.sft.steps,
            rows=read_metrics(run.root),
        )
        stack.enter_context(run.log_to_file())
        stop = stack.enter_context(stop_on_signals(prints=world.is_main))
        begins = "from the start" if done == Position() else f"resuming after {done}"
        reporter.line(f"run {run.root}: {begins}, to step {config.train.max_steps}")
        done, saved = run_sft(parts, done, start_from, stop)
        return run_steps(parts, done, saved, stop)


def run_sft(
    parts: Parts, done: Position, saved: Path | None, stop: StopRequest
) -> tuple[Position, Path | None]:
    """Takes the remaining supervised steps before the first sampling step, if any."""
    config, last = parts.config, parts.config.sft.steps
    stopped = stop.agreed(parts.world)
    while done.step == 0 and done.sft_step < last and not stopped:
        done = Position(sft_step=done.sft_step + 1)
        with explain_step(parts.run, done, saved):
            row = parts.sft.step(done.sft_step)
        log(parts, row)
        parts.reporter.sft_stepped(row, last)
        stopped = stop.agreed(parts.world)
        if done.sft_step == last or stopped or done.sft_step % config.run.save_every == 0:
            saved = save_checkpoint(parts, done)
    if done.sft_step == last:
        parts.sft.forget()
    return done, saved


def run_steps(parts: Parts, done: Position, saved: Path | None, stop: StopRequest) -> TrainReport:
    """Takes the sampling steps after `done`, which `saved` holds, to the last, or to a stop."""
    config, run, world = parts.config, parts.run, parts.world
    if not stop.agreed(world):
        with explain_step(run, done, saved):
            parts.sampler.sync()
            if done.step == 0 and parts.eval_prompts:
                log(parts, {"step": 0, **evaluate_student(parts, 0)})
    stopped = stop.agreed(world)
    while done.step < config.train.max_steps and not stopped:
        step = done.step + 1
        last = step == config.train.max_steps
        with explain_step(run, replace(done, step=step), saved):
            row, groups = train_step(parts, step)
            # Even when a stop is requested: a resumed run would not evaluate this step.
            if parts.eval_prompts and (last or step % config.eval.every == 0):
                row |= evaluate_student(parts, step)
        log(parts, row)
        parts.reporter.stepped(row, groups, config.train.max_steps)
        done = replace(done, step=step)
        stopped = stop.agreed(world)
        if last or stopped or step % config.run.save_every == 0:
            saved = save_checkpoint(parts, done)
    # Stopped after the last supervised step, a run still lacks its first evaluation.
    lacks_evaluation = done.step == 0 and stopped is not None
    last_of_all = Position(step=config.train.max_steps, sft_step=config.sft.steps)
    finished = done >= last_of_all and not lacks_evaluation
    return TrainReport(
        run=run.root, done=done, checkpoint=saved, interrupted_by=None if finished else stopped
    )


def train_step(parts: Parts, step: int) -> tuple[dict[str, Any], list[Group]]:
    """Takes one sampling step and its optimizer steps; returns the metrics and the groups as they trained."""
    config = parts.config
    timer = StepTimer(peak_memory=partial(peak_memory, parts.policy.device))
    groups, queries = sample_and_guide(parts, step, timer)
    learning_rate = learning_rate_at(step, config.train)
    with timer("update"):
        advantages = member_advantages(groups, scale=config.train.scale_rewards)
        set_learning_rate(parts.optimizer, learning_rate)
        # Refills replace groups without a gradient, so that mini-batches are full.
        refilled = config.rollout.max_refills > 0
        trained = [g for g, group in enumerate(groups) if not refilled or group.has_gradient]
        update = parts.updater.update([groups[g] for g in trained], advantages[trained])
    check_sampler_weights(config.rollout, parts.policy.dtype, update.get("sampling/logp_difference"))
    with timer("sync"):
        parts.sampler.sync()
    parts.run.write_step(step, groups, advantages, queries if config.guidance.trigger != "never" else None)
    row = {
        "step": step,
        **step_metrics(groups, queries, update),
        "learning_rate": learning_rate,
        "groups/refilled": len(groups) - config.train.problems_per_step,
        **performance_metrics(timer, groups, update["train_tokens"]),
    }
    return row, groups


def sample_and_guide(parts: Parts, step: int, timer: StepTimer) -> tuple[list[Group], list[QueryRow]]:
    """Returns the step's groups with guidance, and the queries. Up to `rollout.max_refills` times, other
    problems replace groups that would train nothing (DAPO's dynamic sampling, arXiv 2503.14476)."""
    per_step, seed = parts.config.train.problems_per_step, parts.config.train.seed
    prompts = problems_of_step(parts.train_prompts, step=step, per_step=per_step, seed=seed)
    groups, queries = groups_of(parts, prompts, step, timer)
    others = refills_of_step(parts.train_prompts, prompts, step=step, seed=seed)
    for _ in range(parts.config.rollout.max_refills):
        missing = per_step - sum(group.has_gradient for group in groups)
        refills = list(islice(others, missing))
        if refills:
            with timer("sync"):
                parts.sampler.sync()
            more_groups, more_queries = groups_of(parts, refills, step, timer)
            groups, queries = groups + more_groups, queries + more_queries
    return groups, queries


def groups_of(
    parts: Parts, prompts: Sequence[Prompt], step: int, timer: StepTimer
) -> tuple[list[Group], list[QueryRow]]:
    """Samples and guides this rank's share of the prompts; returns all groups, in order, on every rank."""
    with parts.sampler.sampling():
        with timer("sample"), parts.policy.computing():
            sampled = sample_groups(
                parts.sampler,
                parts.rewarder,
                parts.world.share(prompts),
                parts.config.rollout,
                seed=parts.config.train.seed,
                key=f"step {step}",
                on_sample=lambda done, total: parts.reporter.sampling(f"step {step}", done, total),
                timer=timer,
            )
        with timer("sync"):
            parts.sampler.sleep()
        with parts.policy.gathered():
            guided = parts.guide.guide(sampled, step=step, timer=timer)
    shares = parts.world.gather(guided)
    found = {group.problem_id: group for groups, _ in shares for group in groups}
    groups = [found[prompt.problem.problem_id] for prompt in prompts]
    order = {group.problem_id: index for index, group in enumerate(groups)}
    rows = [row for _, rows in shares for row in rows]
    return groups, sorted(rows, key=lambda row: order[row.problem_id])


def evaluate_student(parts: Parts, step: int) -> dict[str, float]:
    """Evaluates on the held-out problems, writes the samples, and returns the metrics."""
    config, started = parts.config, time.perf_counter()
    with parts.sampler.sampling(), parts.policy.computing():
        evaluation = evaluate(
            config,
            parts.sampler,
            parts.rewarder,
            parts.eval_prompts,
            world=parts.world,
            on_sample=lambda done, total: parts.reporter.sampling("evaluation", done, total),
        )
    parts.run.write_evaluation(step, evaluation.samples)
    parts.reporter.evaluated(step, evaluation)
    return {**evaluation.metrics, "seconds/eval": round(time.perf_counter() - started, 4)}


def log(parts: Parts, row: dict[str, Any]) -> None:
    """Appends a row to metrics.jsonl, and sends it to the trackers of `run.report_to`."""
    parts.run.add_metrics(row)
    parts.trackers.log(row)
