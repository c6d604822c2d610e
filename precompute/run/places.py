"""Where teachers work: in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines.registry import load_engine, prepare_engine, resolve_engine
from precompute.run.plan import TeacherOutcome
from precompute.run.progress import Reporter
from precompute.run.shard import Shard
from precompute.run.solve import Job, TeacherWork, longest_prompt
from precompute.verify.verifier import Verifier
from store.errors import ConfigError, EngineError
from store.records import Problem
from store.writer import StoreWriter

RAY = "ray"
"""Instead of an engine's name: the teachers' own engines, on the workers of a Ray cluster."""


class Place(Protocol):
    """Where teachers work."""

    @property
    def shard(self) -> str | None:
        """What the store's writer is opened as."""
        ...

    def engine_of(self, teacher: TeacherConfig) -> str:
        """The engine that draws its samples, resolved. Raises EngineError."""
        ...

    def version_of(self, teacher: TeacherConfig, engine: str) -> str:
        """The engine's version. Raises EngineError for what the engine cannot honour."""
        ...

    def solve(
        self,
        job: Job,
        problems: Sequence[Problem],
        config: PrecomputeConfig,
        writer: StoreWriter,
        verifier: Verifier,
        reporter: Reporter,
    ) -> TeacherOutcome:
        """Draws, judges and keeps what the store lacks of one teacher. Counts of the store are left at 0."""
        ...


@contextmanager
def place_of(
    config: PrecomputeConfig, engine: str | None, shard: Shard | None, reporter: Reporter
) -> Iterator[Place]:
    """Where `engine` (None: what each teacher's table says) has them work. Raises EngineError, and
    ConfigError for a shard where there can be none."""
    if engine != RAY:
        yield Here(engine, shard.name if shard else None)
        return
    if shard is not None:
        raise ConfigError(f"--shard {shard}: --engine ray splits the problems itself; give one of the two")
    if find_spec("ray") is None:
        raise EngineError('engine "ray" is not installed; pip install "ampo[ray]" installs it')
    from precompute.run.ray_cluster import connected

    with connected(config, reporter) as cluster:
        yield cluster


@dataclass(frozen=True, slots=True)
class Here:
    """In this process, one teacher after the other."""

    engine: str | None
    """Overrides what the teachers' tables say."""
    shard: str | None

    def engine_of(self, teacher: TeacherConfig) -> str:
        """As this machine allows."""
        return resolve_engine(self.engine or teacher.engine)

    def version_of(self, teacher: TeacherConfig, engine: str) -> str:
        """After a check of all that can be checked on this machine."""
        return prepare_engine(teacher, engine)

    def solve(
        self,
        job: Job,
        problems: Sequence[Problem],
        config: PrecomputeConfig,
        writer: StoreWriter,
        verifier: Verifier,
        reporter: Reporter,
    ) -> TeacherOutcome:
        """Loads the model if there is something left to draw."""
        started = time.monotonic()
        done = writer.done(job.name)
        work = TeacherWork(job, problems, done, verifier=verifier, filters=config.filters, reporter=reporter)
        if work.left:
            work.fill_prompts()
            reporter.message(f"{job.name}: loading {job.config.model} with {job.engine}")
            longest = longest_prompt(work.prompts)
            engine = load_engine(
                job.config, job.engine, job.tokenizer, longest_prompt=longest, report=reporter.message
            )
            with closing(engine):
                work.run(engine, writer.append, config.store)
        progress = work.progress()
        reporter.finished(progress)
        return TeacherOutcome(
            name=job.name,
            model=job.config.model,
            engine=job.engine,
            new_samples=progress.judged,
            new_tokens=progress.tokens,
            seconds=time.monotonic() - started,
        )
