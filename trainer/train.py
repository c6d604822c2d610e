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
from trainer.evaluation import evaluate, metrics_of
from trainer.method.groups import Group, Prompt
from trainer.method.guidance import QueryRow
from trainer.method.rollouts import problems_of_step, refills_of_step, sample_groups
from trainer.method.update import member_advantages
from trainer.parallel.signals import StopSignal, stop_on_signals
from trainer.parallel.world import ALONE, World
from trainer.run.resume import (
    TrainReport,
    explain_step,
    find_start,
    is_evaluated,
    lacks_evaluation,
    restore,
    save,
)
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import OnGroup, OnStep, Run, explain_memory
from trainer.sampling.samplers import check_sampler_weights
from trainer.student.optimizer import learning_rate_at, set_learning_rate
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import StepTimer, peak_memory, step_metrics
from trainer.telemetry.trackers import start_trackers
from trainer.variants import guided_weight


def train(
    config: Config,
    *,
    resume: str = "auto",
    changed_store: bool = False,
    reporter: TrainReporter | None = None,
    world: World = ALONE,
    on_step: OnStep | None = None,
    on_group: OnGroup | None = None,
) -> TrainReport:
    """Trains the student; the first Ctrl-C finishes the step, saves, and returns.

    Args:
        resume: `auto` resumes from the run's last checkpoint, if any; `never` refuses a run that exists; else
            the path of a checkpoint.
        changed_store: continue though the store holds other traces than before; the result is another run
            than the uninterrupted one.
        reporter: prints the run; None: nothing is printed.
        world: the ranks that train together (parallel/world.py); each of them calls this.
        on_step: called with every row of metrics.jsonl: a dict of the step and its metrics.
        on_group: called with the step and each of its groups, as it trained.

    Raises UserError for everything that a user can mend, before the first step.
    """
    reporter = reporter or TrainReporter()
    files = RunFiles(Path(config.run.dir).absolute() / config.run.name, writes=world.is_main)
    with ExitStack() as stack:
        stack.enter_context(files.held())
        start = world.from_main(lambda: find_start(files, config, resume, checksums=True))
        with explain_memory("setting up the run"):
            run = Run(config, files, start, reporter, stack, world)
        run.on_step, run.on_group = on_step or run.on_step, on_group or run.on_group
        if start is not None:
            restore(run, start, changed_store=changed_store)
        resumed = start is not None and start.parent == files.checkpoints
        after = run.done if resumed else Position()
        files.start(config, after=after, processes=world.size)
        run.trackers = start_trackers(
            config.run.report_to if world.is_main else (),
            files.root,
            config.model_dump(mode="json"),
            done=after.step + after.sft_step,
            stack=stack,
        )
        stop = stack.enter_context(stop_on_signals(world))
        begins = "from the start" if run.done == Position() else f"resuming after {run.done}"
        reporter.line(f"run {files.root}: {begins}, to step {config.train.max_steps}")
        run_sft(run, stop)
        return run_steps(run, stop)


def run_sft(run: Run, stop: StopSignal) -> None:
    """Takes the remaining supervised steps before the first sampling step, if any."""
    last = run.config.sft.steps
    while run.done.step == 0 and run.done.sft_step < last and not stop():
        done = Position(sft_step=run.done.sft_step + 1)
        with explain_step(run, done):
            row = run.sft.step(done.sft_step)
        run.done = done
        log(run, row)
        run.reporter.sft_stepped(row, last)
        if done.sft_step == last or done.sft_step % run.config.run.save_every == 0:
            save(run)
    if run.done == Position(sft_step=last):
        run.sft.optimizer.state.clear()  # frees it; the buffer's updates begin with a fresh one


def run_steps(run: Run, stop: StopSignal) -> TrainReport:
    """Takes the remaining sampling steps, or those until a stop, and saves the last."""
    config, last = run.config, run.config.train.max_steps
    if not stop():
        with explain_step(run, run.done):
            run.sampler.sync()
            if lacks_evaluation(run):
                log(run, {"step": run.done.step, **evaluate_student(run, run.done.step, stop)})
    while run.done.step < last and not stop():
        step = run.done.step + 1
        with explain_step(run, replace(run.done, step=step)):
            row, groups = train_step(run, step)
            if is_evaluated(run, step):
                row |= evaluate_student(run, step, stop)
        run.done = replace(run.done, step=step)
        for group in groups if run.world.is_main else ():
            run.on_group(step, group)
        log(run, row)
        run.reporter.stepped(row, groups, last)
        if step % config.run.save_every == 0:
            save(run)
    # Stopped before the first sampling step, a run may lack its first evaluation, even if it has no other.
    stopped = None if run.done.step == last > 0 else stop()
    save(run)
    return TrainReport(run=run.files.root, done=run.done, checkpoint=run.saved, interrupted_by=stopped)


def train_step(run: Run, step: int) -> tuple[dict[str, Any], list[Group]]:
    """Takes one sampling step and its optimizer steps; returns the metrics and the groups as they trained."""
    config = run.config
    timer = StepTimer(peak_memory=partial(peak_memory, run.policy.device))
    groups, queries = sample_and_guide(run, step, timer)
    learning_rate = learning_rate_at(step, config.train)
    with timer("update"):
        guidance, scale = config.guidance, config.train.scale_rewards
        advantages = member_advantages(groups, scale=scale, baseline=guidance.baseline)
        set_learning_rate(run.optimizer, learning_rate)
        # Refills replace groups without a gradient, so that mini-batches are full.
        refilled = config.rollout.max_refills > 0
        trained = [g for g, group in enumerate(groups) if not refilled or group.has_gradient]
        mu = guided_weight(step, config.train.max_steps, guidance)
        has_traces = any(group.traces for group in groups)
        weights = (mu, 1.0 - mu if guidance.complement and has_traces else 1.0)
        update = run.updater.update([groups[g] for g in trained], [advantages[g] for g in trained], weights)
        if run.buffer is not None:
            update |= run.buffer.train()
    check_sampler_weights(config.rollout, run.policy.dtype, update.get("sampling/logp_difference"))
    with timer("sync"):
        run.sampler.sync()
    run.files.write_step(step, groups, advantages, queries if config.guidance.trigger != "never" else None)
    row = {
        "step": step,
        **step_metrics(groups, queries, update),
        "learning_rate": learning_rate,
        "groups/refilled": len(groups) - config.train.problems_per_step,
        **timer.metrics(groups, update["train_tokens"]),
    }
    return row, groups


def sample_and_guide(run: Run, step: int, timer: StepTimer) -> tuple[list[Group], list[QueryRow]]:
    """Returns the step's groups with guidance, and the queries. Up to `rollout.max_refills` times, other
    problems replace groups that would train nothing (DAPO's dynamic sampling, arXiv 2503.14476)."""
    per_step, seed = run.config.train.problems_per_step, run.config.train.seed
    prompts = problems_of_step(run.train_prompts, step=step, per_step=per_step, seed=seed)
    groups, queries = groups_of(run, prompts, step, timer)
    others = refills_of_step(run.train_prompts, prompts, step=step, seed=seed)
    for _ in range(run.config.rollout.max_refills):
        missing = per_step - sum(group.has_gradient for group in groups)
        refills = list(islice(others, missing))
        if refills:
            with timer("sync"):
                run.sampler.sync()
            more_groups, more_queries = groups_of(run, refills, step, timer)
            groups, queries = groups + more_groups, queries + more_queries
    return groups, queries


def groups_of(
    run: Run, prompts: Sequence[Prompt], step: int, timer: StepTimer
) -> tuple[list[Group], list[QueryRow]]:
    """Samples and guides this rank's share of the prompts; returns all groups, in order, on every rank."""
    with run.sampler.sampling():
        with timer("sample"), run.policy.computing():
            sampled = sample_groups(
                run.sampler,
                run.rewarder,
                run.world.share(prompts),
                run.config.rollout,
                seed=run.config.train.seed,
                key=f"step {step}",
                on_sample=lambda done, total: run.reporter.progress(f"step {step}", done, total),
                timer=timer,
            )
        if run.guide.inserter is None:  # which samples once more
            with timer("sync"):
                run.sampler.sleep()
        with run.policy.gathered():
            guided = run.guide.guide(sampled, step=step, timer=timer)
        if run.guide.inserter is not None:
            with timer("sync"):
                run.sampler.sleep()
    shares = run.world.gather(guided)
    found = {group.problem_id: group for groups, _ in shares for group in groups}
    groups = [found[prompt.problem.problem_id] for prompt in prompts]
    if run.buffer is not None:
        groups = run.buffer.collect(groups)
    order = {group.problem_id: index for index, group in enumerate(groups)}
    rows = [row for _, rows in shares for row in rows]
    return groups, sorted(rows, key=lambda row: order[row.problem_id])


def evaluate_student(run: Run, step: int, stop: StopSignal) -> dict[str, float]:
    """Evaluates on the held-out sets, writes the samples, and returns the metrics; {} after a stop, so that
    the step is saved at once: a resumed run evaluates it."""
    config, started, evaluations = run.config, time.perf_counter(), []
    with run.sampler.sampling(), run.policy.computing():
        for name, prompts in run.eval_prompts.items():
            evaluation = evaluate(
                config,
                run.sampler,
                run.rewarder,
                prompts,
                name=name,
                world=run.world,
                on_sample=lambda done, total: run.reporter.progress("evaluation", done, total),
                halts=lambda: stop.received,
            )
            if evaluation is None:
                return {}
            evaluations.append(evaluation)
    run.files.write_evaluation(step, [sample for each in evaluations for sample in each.samples])
    for evaluation in evaluations:
        run.reporter.evaluated(step, evaluation)
    return {**metrics_of(evaluations), "seconds/eval": round(time.perf_counter() - started, 4)}


def log(run: Run, row: dict[str, Any]) -> None:
    """Appends a row to metrics.jsonl, and gives it to `on_step` and to the trackers of `run.report_to`."""
    run.files.add_metrics(row)
    if run.world.is_main:
        run.on_step(row)
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    for tracker in run.trackers:
        tracker.log(numbers, step=run.done.sft_step + run.done.step)
