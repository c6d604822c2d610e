"""`ampo train`, top to bottom: warm up, sample, reward, guide, update, sync, log, evaluate, save.

Departures from the paper's published code stand in docs/departures.md.

    ampo train --config configs/lab.toml
    ampo train --config configs/lab.toml --set guidance.trigger=never --set run.name=grpo

Under `torchrun` every process runs this same story: it samples and guides its share of a step's problems, and
from there on has all groups. The first one writes and speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.evaluation import eval_sampling, evaluate
from trainer.method.groups import Group
from trainer.method.guidance import QueryRow
from trainer.method.rollouts import Prompt, sample_groups, sampling_of
from trainer.method.schedule import problems_of_step, refills_of_step
from trainer.method.update import member_advantages
from trainer.parallel.fsdp import gathered_weights
from trainer.parallel.signals import StopRequest, stop_on_signals
from trainer.parallel.world import ALONE, World
from trainer.run import checkpoint
from trainer.run.checkpoint import TrainState
from trainer.run.errors import explain_memory, explain_step
from trainer.run.resume import check_unchanged, find_whole_start, optimizer_at, resume_state
from trainer.run.run_dir import Position, RunFiles, UnwrittenRun
from trainer.run.setup import Parts, assemble
from trainer.sampling.samplers import check_sampler_weights
from trainer.student.optimizer import learning_rate_at, set_learning_rate
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import step_metrics
from trainer.timing import StepTimer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """How a call of `train` ended."""

    run: Path
    done: Position
    """Steps taken in all, those before a resume included."""
    checkpoint: Path | None
    """The last one there is; None when there is none."""
    interrupted_by: str | None
    """`SIGINT` or `SIGTERM`; None when it ran to the end."""

    @property
    def step(self) -> int:
        """Sampling steps done in all."""
        return self.done.step


def train(
    config: Config,
    *,
    resume: str = "auto",
    changed_store: bool = False,
    reporter: TrainReporter,
    world: World = ALONE,
) -> TrainReport:
    """Trains the student and returns how it ended; the first Ctrl-C ends the step, saves, and returns.

    Args:
        resume: `auto` goes on from the run's last checkpoint, where there is one; `never` refuses a run that
            exists; else the path of a checkpoint.
        changed_store: go on though the store holds other traces than before; what follows is another run
            than the uninterrupted one.
        world: see `distributed.joined`; each of its processes calls this.

    Raises UserError for everything a user can mend, before the first step.
    """
    kind = RunFiles if world.is_main else UnwrittenRun
    run = kind(Path(config.run.dir).absolute() / config.run.name)
    start_from = world.from_main(lambda: find_whole_start(run, config, resume))
    run.check_writable()
    with ExitStack() as stack:
        with explain_memory("putting the run together"):
            parts = assemble(config, run, start_from, reporter, stack, world)
        with explain_memory(f"taking up the optimizer of {start_from}"):
            done = resume_state(parts, start_from, changed_store=changed_store)
        stack.enter_context(run.held())
        world.from_main(lambda: check_unchanged(run, config, resume, start_from))
        goes_on = start_from is not None and start_from.parent == run.checkpoints
        after = done if goes_on else Position()
        run.start(config, after=after, processes=world.size)
        told = config.model_dump(mode="json")
        parts.trackers.begin(
            run.root,
            told,
            after=(after.step, after.sft_step),
            sft_steps=config.warmup.sft_steps,
            rows=run.metrics(),
        )
        stack.enter_context(run.log_to_file())
        stop = stack.enter_context(stop_on_signals(prints=world.is_main))
        begins = "from the start" if done == Position() else f"going on after {done}"
        reporter.started(run=run.root, begins=begins, after_step=done.step, max_steps=config.train.max_steps)
        done, saved = warm_up(parts, done, start_from, stop)
        return run_steps(parts, done, saved, stop)


def warm_up(
    parts: Parts, done: Position, saved: Path | None, stop: StopRequest
) -> tuple[Position, Path | None]:
    """The supervised steps that are still to be taken before the first sampling step, if any."""
    config, last = parts.config, parts.config.warmup.sft_steps
    stopped = stop.agreed(parts.world)
    while done.step == 0 and done.sft_step < last and not stopped:
        step = Position(sft_step=done.sft_step + 1)
        with explain_step(parts.run, step, saved):
            row = parts.warmup.step(step.sft_step)
        _log(parts, row)
        parts.reporter.warmed_up(row, last)
        done = step
        stopped = stop.agreed(parts.world)
        if step.sft_step == last or stopped or step.sft_step % config.run.save_every == 0:
            saved = save(parts, step)
    if done.sft_step == last:
        parts.warmup.forget()
    return done, saved


def run_steps(parts: Parts, done: Position, saved: Path | None, stop: StopRequest) -> TrainReport:
    """From the sampling step after `done`, which `saved` holds, to the last, or to a stop."""
    config, run, world = parts.config, parts.run, parts.world
    if not stop.agreed(world):
        with explain_step(run, done, saved):
            parts.sampler.sync()
            if done.step == 0 and parts.eval_prompts:
                _log(parts, {"step": 0, **_evaluate(parts, 0)})
    stopped = stop.agreed(world)
    while done.step < config.train.max_steps and not stopped:
        step = done.step + 1
        last = step == config.train.max_steps
        with explain_step(run, replace(done, step=step), saved):
            row, groups = train_step(parts, step)
            # Even when a stop is wanted: a resumed run would not make up for it.
            if parts.eval_prompts and (last or step % config.eval.every == 0):
                row |= _evaluate(parts, step)
        _log(parts, row)
        parts.reporter.stepped(row, groups)
        done = replace(done, step=step)
        stopped = stop.agreed(world)
        if last or stopped or step % config.run.save_every == 0:
            saved = save(parts, done)
    # Stopped in the last supervised step of all, a run still owes its evaluation.
    owes = done.step == 0 and stopped is not None
    last_of_all = Position(step=config.train.max_steps, sft_step=config.warmup.sft_steps)
    finished = done >= last_of_all and not owes
    return TrainReport(
        run=run.root, done=done, checkpoint=saved, interrupted_by=None if finished else stopped
    )


def train_step(parts: Parts, step: int) -> tuple[dict[str, Any], list[Group]]:
    """One sampling step and its optimizer steps; returns the metrics and the groups as they trained."""
    config, timer = parts.config, parts.meter.begin()
    groups, queries = sample_and_guide(parts, step, timer)
    learning_rate = learning_rate_at(step, config.train)
    with timer("update"):
        advantages = member_advantages(groups, scale=config.train.scale_rewards)
        set_learning_rate(parts.optimizer, learning_rate)
        # Refills stand in for groups without a gradient, so that mini-batches are full ones.
        trained = [
            g for g, group in enumerate(groups) if group.has_gradient or not config.rollout.max_refills
        ]
        update = parts.updater.update([groups[g] for g in trained], advantages[trained])
    check_sampler_weights(config.rollout, parts.policy.dtype, update.sampler_difference)
    with timer("sync"):
        parts.sampler.sync()
    parts.run.write_rollouts(step, groups, advantages)
    if config.guidance.trigger != "never":
        parts.run.write_queries(step, queries)
    row = step_metrics(
        step=step,
        groups=groups,
        queries=queries,
        update=update,
        learning_rate=learning_rate,
        cost=parts.meter.row(timer, groups, advantages, update.tokens),
    )
    row["groups/refilled"] = len(groups) - config.train.problems_per_step
    return row, groups


def sample_and_guide(parts: Parts, step: int, timer: StepTimer) -> tuple[list[Group], list[QueryRow]]:
    """The step's groups with guidance, and what was asked. Up to `rollout.max_refills` times, other problems
    stand in for groups that would train nothing (DAPO's dynamic sampling, arXiv 2503.14476)."""
    per_step, seed = parts.config.train.problems_per_step, parts.config.train.seed
    prompts = problems_of_step(parts.train_prompts, step=step, per_step=per_step, seed=seed)
    groups, queries = _groups_of(parts, prompts, step, timer)
    others = iter(refills_of_step(parts.train_prompts, step=step, per_step=per_step, seed=seed))
    for _ in range(parts.config.rollout.max_refills):
        missing = per_step - sum(group.has_gradient for group in groups)
        stand_ins = list(islice(others, missing))
        if stand_ins:
            with timer("sync"):
                parts.sampler.sync()
            further, asked = _groups_of(parts, stand_ins, step, timer)
            groups, queries = groups + further, queries + asked
    return groups, queries


def _groups_of(
    parts: Parts, prompts: Sequence[Prompt], step: int, timer: StepTimer
) -> tuple[list[Group], list[QueryRow]]:
    """Each process samples and guides its share of the prompts; all get all groups, in order."""
    with parts.sampler.sampling():
        own, asked = _own_groups_of(parts, parts.world.share(prompts), step, timer)
    groups = parts.world.merged(own)
    order = {group.problem.problem_id: place for place, group in enumerate(groups)}
    queries = [row for rows in parts.world.gather(asked) for row in rows]
    return groups, sorted(queries, key=lambda row: order[row.problem_id])


def _own_groups_of(
    parts: Parts, prompts: Sequence[Prompt], step: int, timer: StepTimer
) -> tuple[list[Group], list[QueryRow]]:
    config = parts.config
    with timer("sample"), parts.policy.computing():
        sampled = sample_groups(
            parts.sampler,
            parts.judge,
            prompts,
            sampling_of(config.rollout),
            samples=config.rollout.num_generations,
            seed=config.train.seed,
            key=f"step {step}",
            on_sample=lambda drawn, total: parts.reporter.sampling(f"step {step}", drawn, total),
            timer=timer,
        )
    with timer("sync"):
        parts.sampler.sleep()
    with gathered_weights(parts.policy):
        return parts.guide.guide(sampled, step=step, timer=timer)


def _evaluate(parts: Parts, step: int) -> dict[str, float]:
    config, timer = parts.config, StepTimer()
    with parts.sampler.sampling(), parts.policy.computing():
        evaluation = evaluate(
            parts.sampler,
            parts.judge,
            parts.eval_prompts,
            eval_sampling(config.eval, config.rollout),
            samples=config.eval.samples,
            k=config.eval.k,
            seed=config.train.seed,
            world=parts.world,
            on_sample=lambda drawn, total: parts.reporter.sampling("evaluation", drawn, total),
        )
    parts.run.write_evaluation(step, evaluation.samples)
    parts.reporter.evaluated(step, evaluation)
    return {**evaluation.metrics, "seconds/eval": round(timer.total, 4)}


def _log(parts: Parts, row: dict[str, Any]) -> None:
    """Into metrics.jsonl, and to all that `run.report_to` names."""
    parts.run.add_metrics(row)
    parts.trackers.log(row)


def save(parts: Parts, done: Position) -> Path:
    """A checkpoint of the step that was just finished."""
    state = TrainState(
        done=done,
        config=parts.config.model_dump(mode="json"),
        problems_fingerprint=parts.problems_fingerprint,
        store=parts.usable,
    )
    with explain_memory(f"saving {done} (older checkpoints in {parts.run.checkpoints} are whole)"):
        path = checkpoint.save(
            parts.run.checkpoints,
            parts.policy,
            optimizer_at(parts, done),
            state,
            keep_last=parts.config.run.keep_last,
            world=parts.world,
        )
    parts.reporter.saved(path)
    return path
