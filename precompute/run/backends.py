"""Backends: teachers work in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines.registry import load_engine, prepare_engine, resolve_engine
from precompute.run.progress import Reporter
from precompute.run.solve import PreparedTeacher, Solver, longest_prompt
from precompute.verify.verifier import Verifier
from store.records import Problem
from store.writer import StoreWriter

RAY = "ray"
"""Chosen instead of an engine: the teachers' own engines, on the workers of a Ray cluster."""


class Backend:
    """This process, one teacher after the other."""

    def __init__(self, engine: str | None = None, shard: str | None = None) -> None:
        """`engine` overrides the teachers' own; `shard` names the store's writer."""
        self._engine = engine
        self.shard = shard

    def engine_of(self, teacher: TeacherConfig) -> tuple[str, str]:
        """Returns (resolved engine, its version) after all checks that need no model. Raises EngineError."""
        engine = resolve_engine(self._engine or teacher.engine)
        return engine, prepare_engine(teacher, engine)

    def solve(
        self,
        teacher: PreparedTeacher,
        problems: Sequence[Problem],
        config: PrecomputeConfig,
        writer: StoreWriter,
        verifier: Verifier,
        reporter: Reporter,
    ) -> None:
        """Adds the samples of one teacher that the store lacks; loads the model if there are any."""
        done = writer.done(teacher.name)
        solver = Solver(teacher, problems, done, verifier=verifier, filters=config.filters, reporter=reporter)
        solver.fill_prompts()
        if solver.left:
            reporter.message(f"{teacher.name}: loading {teacher.config.model} with {teacher.engine}")
            longest = longest_prompt(solver.prompts)
            with closing(
                load_engine(teacher.config, teacher.engine, teacher.tokenizer, longest_prompt=longest)
            ) as engine:
                solver.run(engine, writer.append, config.store)
        if failed := solver.failed_line():
            reporter.message(failed)
        reporter.progress(solver.progress(), last=True)
