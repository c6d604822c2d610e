"""A worker on any machine of a cluster: one teacher, loaded once, solves one block of problems after another.

It needs the store's directory, the model and the driver's version of the packages on its machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines import Engine
from precompute.engines.registry import load_engine, load_tokenizer, prepare_engine
from precompute.problems.prompts import tokenizer_fingerprint
from precompute.run.progress import Reporter, TeacherProgress
from precompute.run.solve import PreparedTeacher, Solver
from precompute.verify.verifier import Verifier
from store.errors import EngineError, StoreBusyError
from store.format.reading import read_problems
from store.records import Problem, TeacherRecord
from store.writer import StoreWriter

LOCK_SECONDS = 120.0
"""Longest wait for the lock of a block: over a network file system a lock outlives a dead machine."""
REPORT_SECONDS = 0.5
"""Time between two reports of a block's progress."""

Report = Callable[[int, TeacherProgress | str], None]
"""Receives the number of a block, and its progress or a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """All that a worker needs to know; it travels to other machines."""

    config: PrecomputeConfig
    """With an absolute store.path."""
    teacher: TeacherConfig
    """With an absolute path of a local model."""
    engine: str
    """Resolved."""
    record: TeacherRecord
    """As registered; tokenizer and engine of every worker must agree with it."""
    longest_prompt: int
    """Longest prompt of all blocks in tokens: the engine is loaded once."""


class BlockWorker:
    """Loads its teacher with the first block that lacks samples."""

    def __init__(self, setup: WorkerSetup, report: Report) -> None:
        self._setup = setup
        self._report = report
        self._block = 0
        self._stack = ExitStack()

    def solve(self, block: int, problem_ids: Sequence[str]) -> None:
        """Adds the samples that the store lacks of a block, as a writer of its own. Raises UserErrors.

        What an earlier try of the block wrote counts as done.
        """
        self._block = block
        with self._writer(block) as writer:
            solver = Solver(
                self._teacher,
                [self._problems[problem_id] for problem_id in problem_ids],
                writer.done(self._teacher.name),
                verifier=self._verifier,
                filters=self._setup.config.filters,
                reporter=_BlockReporter(block, self._report),
            )
            if solver.left:
                solver.fill_prompts()
                solver.run(self._engine, writer.append, self._setup.config.store)
            self._report(block, solver.progress())

    def close(self) -> None:
        """Frees the model and ends the verifier."""
        self._stack.close()

    def _writer(self, block: int) -> StoreWriter:
        """Waits for the lock: two workers with one block would take its samples twice."""
        return wait_until_free(
            lambda: StoreWriter.open(
                self._setup.config.store.path,
                verifier=self._verifier.name,
                verifier_version=self._verifier.version,
                shard=block_shard(block),
            ),
            seconds=LOCK_SECONDS,
        )

    @cached_property
    def _problems(self) -> dict[str, Problem]:
        path = Path(self._setup.config.store.path)
        return {problem.problem_id: problem for problem in read_problems(path)}

    @cached_property
    def _teacher(self) -> PreparedTeacher:
        """Raises EngineError if this machine has another tokenizer or engine than the driver."""
        setup = self._setup
        tokenizer = load_tokenizer(setup.teacher)
        own = replace(
            setup.record,
            engine_version=prepare_engine(setup.teacher, setup.engine),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )
        for field in ("engine_version", "tokenizer_fingerprint"):
            found, needed = getattr(own, field), getattr(setup.record, field)
            if found != needed:
                raise EngineError(
                    f"teacher {setup.record.name!r}: {field} is {found} on a worker and {needed} where the "
                    "run was started; every machine of the cluster needs the same packages and models"
                )
        return PreparedTeacher(
            config=setup.teacher, engine=setup.engine, tokenizer=tokenizer, record=setup.record
        )

    @cached_property
    def _verifier(self) -> Verifier:
        return self._stack.enter_context(Verifier.configured(self._setup.config.verify))

    @cached_property
    def _engine(self) -> Engine:
        engine = load_engine(
            self._setup.teacher,
            self._setup.engine,
            self._teacher.tokenizer,
            longest_prompt=self._setup.longest_prompt,
            report=lambda message: self._report(self._block, message),
        )
        return self._stack.enter_context(closing(engine))


def block_shard(block: int) -> str:
    """Returns the name of a block's writer in the store."""
    return f"ray-{block}"


def wait_until_free(open_writer: Callable[[], StoreWriter], *, seconds: float) -> StoreWriter:
    """Returns the writer once no other holds its lock. Raises StoreBusyError after that many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return open_writer()
        except StoreBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


class _BlockReporter(Reporter):
    """Passes on messages at once, and progress every REPORT_SECONDS."""

    def __init__(self, block: int, report: Report) -> None:
        self._block = block
        self._report = report
        self._last = 0.0

    def message(self, text: str) -> None:
        """Passes it on."""
        self._report(self._block, text)

    def progress(self, progress: TeacherProgress) -> None:
        """Passes it on now and then."""
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self._last = time.monotonic()
            self._report(self._block, progress)
