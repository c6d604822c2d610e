"""`ampo precompute teachers`: problems -> prompts -> engine -> verifier -> store, one teacher at a time.

The parts in the store are the record of what is done, so that a run that was stopped anywhere goes on from
there. Every sample has a seed of its own, so that it is the same sample then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines.registry import load_tokenizer
from precompute.problems.problem_files import usable_problems
from precompute.problems.prompts import check_form, demanded_form, tokenizer_fingerprint
from precompute.run.backends import RAY, Backend
from precompute.run.plan import (
    PrecomputePlan,
    PrecomputeReport,
    ProblemsSummary,
    TeacherOutcome,
    TeacherPlan,
    stored_counts,
    typical_failure,
)
from precompute.run.probe import run_probe
from precompute.run.progress import Reporter
from precompute.run.refilter import check_filters, filter_settings
from precompute.run.reverify import check_verdicts
from precompute.run.shard import Shard
from precompute.run.solve import (
    Done,
    PreparedTeacher,
    fill_prompts,
    longest_prompt,
    samples_left,
)
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError, ProblemsError, install_hint
from store.reader import TraceStore
from store.records import Problem, TeacherRecord, content_hash
from store.reports.report import TeacherReport, store_report
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
    """Lets teachers solve problems and fills the store.

    Every recipe and tokenizer is checked before the first model is loaded. Raises UserErrors, and
    KeyboardInterrupt after writing all that was verified; the same call then goes on.

    Args:
        teachers: names; None takes all of the config.
        engine: overrides the engines in the teachers' tables; "ray" takes a cluster.
        limit: the number of problems, taken from the front; None takes all.
        shard: only this share of the problems, which may be empty.
    """
    reporter = reporter or Reporter()
    with ExitStack() as stack:
        backend = stack.enter_context(open_backend(config, engine, shard, reporter))
        prepared = prepare_teachers(config, teachers, backend)
        verifier = stack.enter_context(Verifier(config.verify))
        problems, summary = read_problems(config, limit, shard, verifier, reporter)
        writer = stack.enter_context(
            StoreWriter.open(config.store.path, verifiers=verifier.versions(problems), shard=backend.shard)
        )
        check_verdicts(writer.path, problems, verifier)
        for teacher in prepared:
            check_filters(writer, teacher.record)
            if problems:
                check_form(teacher.config, problems[0], key=f"teachers.{teacher.name}.answer_form")
        writer.write_problems(problems)
        for teacher in prepared:
            writer.register_teacher(teacher.record)
        before, seconds = stored_counts(writer.path, problems), {}
        for teacher in prepared:
            started = time.monotonic()
            for damaged in writer.damaged(teacher.name):
                reporter.message(
                    f"{damaged.part} cannot be read ({damaged.reason}); its samples are taken again"
                )
            backend.solve(teacher, problems, config, writer, verifier, reporter)
            seconds[teacher.name] = time.monotonic() - started
    return _report(summary, problems, writer.path, before, seconds)


def _report(
    summary: ProblemsSummary,
    problems: Sequence[Problem],
    store: Path,
    before: Mapping[str, TeacherReport],
    seconds: Mapping[str, float],
) -> PrecomputeReport:
    with TraceStore(store) as opened:
        report = store_report(opened, [problem.problem_id for problem in problems])
        after = {teacher.teacher: teacher for teacher in report.teachers}
        failures = {
            name: typical_failure(opened, name, problems) for name in seconds if not after[name].verified
        }
    outcomes = [
        TeacherOutcome(
            stored=after[name],
            new_samples=after[name].traces - before[name].traces,
            new_tokens=after[name].tokens - before[name].tokens,
            seconds=took,
            unverified=failures.get(name),
        )
        for name, took in seconds.items()
    ]
    return PrecomputeReport(
        problems=summary, store=str(store), teachers=tuple(outcomes), coverage=report.coverage
    )


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
    """Returns what `run` with the same arguments would do, and touches nothing.

    Raises what `run` would raise before a model is loaded. With `probe` every teacher is loaded and takes one
    sample of that many problems, to estimate tokens, time and disk.
    """
    reporter = reporter or Reporter()
    if probe and engine == RAY:
        raise ConfigError("--probe measures this machine alone; leave --engine ray out")
    with open_backend(config, engine, shard, reporter) as backend:
        prepared = prepare_teachers(config, teachers, backend)
    path = str(Path(config.store.path).absolute())
    with Verifier(config.verify) as verifier:
        problems, summary = read_problems(config, limit, shard, verifier, reporter)
        if not problems:
            raise ProblemsError(f"shard {shard} holds none of the problems; there is nothing to plan")
        store = StoreWriter.peek(path, verifiers=verifier.versions(problems))
        if store is not None:
            check_verdicts(store.path, problems, verifier)
        stored = [(teacher, _stored(store, teacher)) for teacher in prepared]
        plans = [_teacher_plan(teacher, problems, done, reporter) for teacher, done in stored]
        if probe:
            probes = [
                run_probe(teacher, problems, done, config, count=probe, verifier=verifier, reporter=reporter)
                for teacher, done in stored
            ]
            plans = [replace(each, probe=found) for each, found in zip(plans, probes, strict=True)]
    return PrecomputePlan(
        problems=summary,
        store=path,
        store_exists=store is not None,
        first_problem=problems[0],
        teachers=tuple(plans),
    )


def prepare_teachers(
    config: PrecomputeConfig, names: Sequence[str] | None, backend: Backend
) -> list[PreparedTeacher]:
    """Returns the chosen teachers (None: all) with engine, tokenizer and recipe. Raises UserErrors."""
    known = [teacher.name for teacher in config.teachers]
    if not known:
        raise ConfigError("the config names no teacher; add a [[teachers]] table with a name and a model")
    for name in names or ():
        if name not in known:
            raise ConfigError(f"no teacher {name!r} in the config; its teachers: {', '.join(known)}")
    chosen = [teacher for teacher in config.teachers if not names or teacher.name in names]
    filters = filter_settings(config.filters)
    return [_prepared(teacher, backend, filters) for teacher in chosen]


def _prepared(teacher: TeacherConfig, backend: Backend, filters: Mapping[str, Any]) -> PreparedTeacher:
    tokenizer = load_tokenizer(teacher)
    engine, version = backend.engine_of(teacher)
    template = "" if tokenizer is None else tokenizer.chat_template  # a chat server has its own
    sampling = {key: getattr(teacher, key) for key in ("temperature", "top_p", "top_k", "max_tokens")}
    if teacher.quantization:  # quantized weights are another model's
        sampling["quantization"] = teacher.quantization
    if teacher.extra_body:
        sampling["extra_body"] = teacher.extra_body
    record = TeacherRecord(
        name=teacher.name,
        model=teacher.model,
        revision=teacher.revision,
        engine=engine,
        engine_version=version,
        # A tokenizer may have no template, or several by name.
        chat_template=template if isinstance(template, str) else content_hash(template),
        system_prompt=teacher.system_prompt,
        user_template=teacher.user_template,
        chat_template_kwargs=teacher.chat_template_kwargs,
        sampling=sampling,
        tokenizer_fingerprint="" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        answer_form=teacher.answer_form,
        filters=filters,
    )
    return PreparedTeacher(config=teacher, engine=engine, tokenizer=tokenizer, record=record)


def read_problems(
    config: PrecomputeConfig, limit: int | None, shard: Shard | None, verifier: Verifier, reporter: Reporter
) -> tuple[tuple[Problem, ...], ProblemsSummary]:
    """Returns the problems to solve: those of the shard that can be used.

    Raises ProblemsError when there are some and none of them can be used.
    """
    settings = config.problems
    if not settings.train.files:
        raise ConfigError("problems.train is empty; name a file with the problems to solve")
    usable, found = usable_problems(
        settings,
        settings.train,
        verifier,
        key="problems.train",
        warn=lambda line: reporter.message(f"warning: {line}"),
        limit=limit,
        shard=shard.of if shard else None,
        progress=partial(reporter.show, "checking gold answers"),
    )
    return usable, ProblemsSummary(
        path=settings.train.name,
        rows=found.rows,
        duplicates=found.duplicates,
        left_out=found.left_out.counts.total(),
        used=len(usable),
        shard=str(shard) if shard else None,
    )


def _stored(store: StoreWriter | None, teacher: PreparedTeacher) -> Done:
    """The teacher's samples in the store. Raises RecipeChangedError as a run would."""
    if store is None:
        return {}
    store.check_recipe(teacher.record)
    check_filters(store, teacher.record)
    return store.done(teacher.name)


def _teacher_plan(
    teacher: PreparedTeacher, problems: Sequence[Problem], done: Done, reporter: Reporter
) -> TeacherPlan:
    prompts = fill_prompts(teacher, problems, done, reporter)
    stored = [done.get(problem.problem_id, {}) for problem in problems]
    left = sum(samples_left(teacher.config, samples) for samples in stored)
    first = next(iter(prompts.values()))
    return TeacherPlan(
        name=teacher.name,
        engine=teacher.engine,
        sample_budget=teacher.config.sample_budget,
        samples_stored=sum(map(len, stored)),
        usable_stored=sum(sum(samples.values()) for samples in stored),
        samples_left=left,
        most_tokens=left * teacher.config.max_tokens,
        longest_prompt=longest_prompt(prompts),
        first_prompt=first.text,
        opens_think=first.opens_think,
        answer_form=demanded_form(teacher.config, problems[0]),
    )


@contextmanager
def open_backend(
    config: PrecomputeConfig, engine: str | None, shard: Shard | None, reporter: Reporter
) -> Iterator[Backend]:
    """Connects to the cluster for the engine "ray"; any other engine (None: each teacher's own) is local.

    Raises EngineError, and ConfigError for a shard on a cluster.
    """
    if engine != RAY:
        yield Backend(engine, shard.name if shard else None)
        return
    if shard is not None:
        raise ConfigError(f"--shard {shard}: --engine ray splits the problems itself; give one of the two")
    if find_spec("ray") is None:
        raise EngineError(f'engine "ray" is not installed; {install_hint("ray")} installs it')
    from precompute.run.ray_cluster import connected

    with connected(config.ray, reporter) as cluster:
        yield cluster
