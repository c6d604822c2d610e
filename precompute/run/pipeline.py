"""`ampo precompute teachers`: problems -> prompts -> engine -> verifier -> store, one teacher at a time.

What is done is what the parts say; a run that was stopped anywhere goes on from there. Samples are seeded
by what they are, so the run that goes on draws what the other one would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines.registry import load_tokenizer
from precompute.problems.problem_files import load_problems, of_key, split_by_gold
from precompute.problems.prompts import demanded_form, tokenizer_fingerprint
from precompute.run.draws import Done, samples_left
from precompute.run.places import RAY, Place, place_of
from precompute.run.plan import (
    PrecomputePlan,
    PrecomputeReport,
    ProblemsSummary,
    TeacherOutcome,
    TeacherPlan,
    coverage,
    stored_counts,
)
from precompute.run.probe import expect, run_probe
from precompute.run.progress import Reporter, SilentReporter
from precompute.run.refilter import check_filters, filter_settings
from precompute.run.shard import Shard
from precompute.run.solve import STAGE_PROBLEMS, Job, fill_prompts, longest_prompt
from precompute.verify.verifier import VERIFIER_NAME, VERIFIER_VERSION, Verifier
from store.errors import ConfigError, ProblemsError
from store.reader import TraceStore
from store.records import Problem, TeacherRecord, content_hash
from store.writer import StoreWriter


def run(
    config: PrecomputeConfig,
    *,
    teachers: Sequence[str] | None = None,
    engine: str | None = None,
    limit: int | None = None,
    shard: Shard | None = None,
    reporter: Reporter | None = None,
) -> PrecomputeReport:
    """Lets the teachers (None: all of the config) solve the problems (None: all; else the first `limit`)
    and fills the store. `engine` overrides what the teachers' tables say. With `shard` only its share of
    those problems, beside processes that solve the other shards; it may be empty.

    Every recipe and tokenizer is checked before the first model is loaded. Raises UserErrors;
    KeyboardInterrupt after writing what was verified by then: the same call goes on.
    """
    reporter = reporter or SilentReporter()
    outcomes = []
    with ExitStack() as stack:
        place = stack.enter_context(place_of(config, engine, shard, reporter))
        jobs = _jobs(config, teachers, place)
        verifier = stack.enter_context(Verifier.configured(config.verify))
        problems, summary = _problems(config, limit, shard, verifier, reporter)
        with _open_store(config, place.shard) as writer:
            for job in jobs:
                check_filters(writer, job.record)
            writer.write_problems(problems)
            for job in jobs:
                writer.register_teacher(job.record)
            for job in jobs:
                _say_damaged(writer, job, reporter)
                outcomes.append(place.solve(job, problems, config, writer, verifier, reporter))
    return _report(config, summary, problems, outcomes)


def plan(
    config: PrecomputeConfig,
    *,
    teachers: Sequence[str] | None = None,
    engine: str | None = None,
    limit: int | None = None,
    shard: Shard | None = None,
    probe: int = 0,
    reporter: Reporter | None = None,
) -> PrecomputePlan:
    """What `run` with the same arguments would do; raises what it would raise before a model is loaded.

    With `probe` every teacher is loaded and draws one sample of that many problems, so that tokens, time and
    disk can be told. Touches nothing.
    """
    reporter = reporter or SilentReporter()
    if probe and engine == RAY:
        raise ConfigError("--probe measures this machine alone; leave --engine ray out")
    with place_of(config, engine, shard, reporter) as place:
        jobs = _jobs(config, teachers, place)
    path = str(Path(config.store.path).absolute())
    with Verifier.configured(config.verify) as verifier:
        problems, summary = _problems(config, limit, shard, verifier, reporter)
        if not problems:
            raise ProblemsError(f"shard {shard} holds none of the problems; there is nothing to plan")
        store = StoreWriter.peek(path, verifier=VERIFIER_NAME, verifier_version=VERIFIER_VERSION)
        there = [_there(store, job) for job in jobs]
        plans = [_teacher_plan(job, problems, done, reporter) for job, done in zip(jobs, there, strict=True)]
        if probe:
            plans = [
                _probed(plan, job, problems, done, config, probe, verifier, reporter)
                for plan, job, done in zip(plans, jobs, there, strict=True)
            ]
    return PrecomputePlan(
        problems=summary,
        store=path,
        store_exists=store is not None,
        first_problem=problems[0],
        teachers=tuple(plans),
    )


def _jobs(config: PrecomputeConfig, names: Sequence[str] | None, place: Place) -> list[Job]:
    known = [teacher.name for teacher in config.teachers]
    if not known:
        raise ConfigError("the config names no teacher; add a [[teachers]] table with a name and a model")
    for name in names or ():
        if name not in known:
            raise ConfigError(f"no teacher {name!r} in the config; its teachers: {', '.join(known)}")
    chosen = [teacher for teacher in config.teachers if not names or teacher.name in names]
    filters = filter_settings(config.filters)
    return [_job(teacher, place, filters) for teacher in chosen]


def _job(teacher: TeacherConfig, place: Place, filters: Mapping[str, Any]) -> Job:
    engine = place.engine_of(teacher)
    tokenizer = load_tokenizer(teacher)
    template = tokenizer.chat_template
    record = TeacherRecord(
        name=teacher.name,
        model=teacher.model,
        revision=teacher.revision,
        engine=engine,
        engine_version=place.version_of(teacher, engine),
        # A tokenizer may bring none, or several by name.
        chat_template=template if isinstance(template, str) else content_hash(template),
        system_prompt=teacher.system_prompt,
        chat_template_kwargs=teacher.chat_template_kwargs,
        sampling={
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "top_k": teacher.top_k,
            "max_tokens": teacher.max_tokens,
            # Weights in fewer bits are another model's.
            **({"quantization": teacher.quantization} if teacher.quantization else {}),
        },
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        answer_form=teacher.answer_form,
        filters=filters,
    )
    return Job(config=teacher, engine=engine, tokenizer=tokenizer, record=record)


def _problems(
    config: PrecomputeConfig, limit: int | None, shard: Shard | None, verifier: Verifier, reporter: Reporter
) -> tuple[tuple[Problem, ...], ProblemsSummary]:
    """The problems to solve. ProblemsError when there are some and no gold answer can be parsed."""
    if not config.problems.train:
        raise ConfigError("problems.train is empty; name a Parquet or JSONL file with the problems to solve")
    with of_key("problems.train"):
        found = load_problems(
            config.problems.train,
            question_column=config.problems.question_column,
            answer_column=config.problems.answer_column,
        )
    chosen = found.problems[:limit]
    if shard is not None:
        chosen = shard.of(chosen)
    usable, unparseable = _check_golds(chosen, verifier, reporter)
    if not usable and not shard:
        raise ProblemsError(
            f"problems.train: {config.problems.train}: no gold answer of its problems can be parsed"
        )
    if unparseable:
        shown = ", ".join(f"{problem.problem_id} ({problem.answer[:30]!r})" for problem in unparseable[:3])
        reporter.message(f"{len(unparseable)} gold answers cannot be parsed; left out: {shown} ...")
    return usable, ProblemsSummary(
        path=str(Path(config.problems.train).absolute()),
        rows=found.rows,
        duplicates=found.duplicates,
        unparseable=unparseable,
        used=len(usable),
        shard=str(shard) if shard else None,
    )


def _check_golds(
    problems: Sequence[Problem], verifier: Verifier, reporter: Reporter
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    usable: list[Problem] = []
    unparseable: list[Problem] = []
    for start in range(0, len(problems), STAGE_PROBLEMS):
        fine, broken = split_by_gold(problems[start : start + STAGE_PROBLEMS], verifier)
        usable += fine
        unparseable += broken
        reporter.stage("checking gold answers", len(usable) + len(unparseable), len(problems))
    return tuple(usable), tuple(unparseable)


def _there(store: StoreWriter | None, job: Job) -> Done:
    """What the store has of the teacher. Raises what a run would raise about it."""
    if store is None:
        return {}
    store.check_recipe(job.record)
    check_filters(store, job.record)
    return store.done(job.name)


def _teacher_plan(job: Job, problems: Sequence[Problem], done: Done, reporter: Reporter) -> TeacherPlan:
    prompts = fill_prompts(job, problems, reporter)
    there = [done.get(problem.problem_id, {}) for problem in problems]
    left = [samples_left(job.config, samples) for samples in there]
    first = prompts[problems[0].problem_id]
    return TeacherPlan(
        name=job.name,
        model=job.config.model,
        engine=job.engine,
        sample_budget=job.config.sample_budget,
        samples_there=sum(map(len, there)),
        usable_there=sum(sum(samples.values()) for samples in there),
        problems_left=sum(count > 0 for count in left),
        samples_left=sum(left),
        longest_prompt=longest_prompt(prompts),
        most_tokens=sum(left) * job.config.max_tokens,
        weight_bytes=_weight_bytes(job.config.model),
        first_prompt=first.text,
        opens_think=first.opens_think,
        answer_form=demanded_form(job.config, problems[0]),
    )


def _probed(
    plan: TeacherPlan,
    job: Job,
    problems: Sequence[Problem],
    done: Done,
    config: PrecomputeConfig,
    count: int,
    verifier: Verifier,
    reporter: Reporter,
) -> TeacherPlan:
    """The plan with what a probe of `count` problems leads to expect."""
    probe = run_probe(job, problems, done, config, count=count, verifier=verifier, reporter=reporter)
    if probe is None:
        return plan
    there = [done.get(problem.problem_id, {}) for problem in problems]
    least, most = expect(job.config, there, probe, part_traces=config.store.part_traces)
    return replace(plan, probe=probe, least=least, most=most)


def _weight_bytes(model: str) -> int | None:
    files = [file for kind in ("*.safetensors", "*.bin") for file in Path(model).glob(kind)]
    return sum(file.stat().st_size for file in files) if files else None


def _say_damaged(writer: StoreWriter, job: Job, reporter: Reporter) -> None:
    for damaged in writer.damaged(job.name):
        reporter.message(f"{damaged.part} cannot be read ({damaged.reason}); its samples are drawn again")


def _report(
    config: PrecomputeConfig,
    summary: ProblemsSummary,
    problems: Sequence[Problem],
    outcomes: Sequence[TeacherOutcome],
) -> PrecomputeReport:
    ids = [problem.problem_id for problem in problems]
    with TraceStore(config.store.path) as store:
        counts = stored_counts(store, ids)
        return PrecomputeReport(
            problems=summary,
            store=str(store.path),
            teachers=tuple(replace(each, **counts.get(each.name, {})) for each in outcomes),
            coverage=coverage(store, ids),
        )


def _open_store(config: PrecomputeConfig, shard: str | None) -> StoreWriter:
    return StoreWriter.open(
        config.store.path, verifier=VERIFIER_NAME, verifier_version=VERIFIER_VERSION, shard=shard
    )
