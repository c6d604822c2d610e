"""A worker on any machine of a cluster: one teacher, loaded once, solves one block of problems after another.

Knows nothing of what carries the blocks to it. Needs the store's directory, the model and this very version
of the packages where it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Protocol

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.engines import Engine
from precompute.engines.registry import load_engine, load_tokenizer, prepare_engine
from precompute.problems.prompts import tokenizer_fingerprint
from precompute.run.progress import SilentReporter, TeacherProgress
from precompute.run.solve import Job, TeacherWork
from precompute.verify.verifier import VERIFIER_NAME, VERIFIER_VERSION, Verifier
from store.errors import EngineError, StoreBusyError
from store.format.reading import read_problems
from store.records import Problem, TeacherRecord
from store.writer import StoreWriter

LOCK_SECONDS = 120.0
"""How long a block waits for a worker that was taken for dead to be so: over a network file system a lock
outlives the machine that held it."""

REPORT_SECONDS = 0.5
"""Between two reports of how far a block is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTask:
    """What a worker has to know; it travels to other machines."""

    config: PrecomputeConfig
    """With the store's path from the root."""
    teacher: TeacherConfig
    """With the model's path from the root, where it is a path."""
    engine: str
    """Resolved."""
    record: TeacherRecord
    """As registered: every worker's tokenizer and engine must be those."""
    longest_prompt: int
    """In tokens, over the problems of all blocks: the engine is loaded once."""


class Tell(Protocol):
    """Where a worker says what it does."""

    def progress(self, block: int, progress: TeacherProgress) -> None:
        """How far a block is."""
        ...

    def message(self, text: str) -> None:
        """Something worth a line."""
        ...


class BlockWorker:
    """Loads its teacher with the first block that has something left to draw. A context manager."""

    def __init__(self, task: BlockTask, tell: Tell) -> None:
        self._task = task
        self._tell = tell
        self._stack = ExitStack()
        self._engine: Engine | None = None
        self._verifier: Verifier | None = None
        self._job: Job | None = None
        self._problems: dict[str, Problem] = {}

    def solve(self, block: int, problem_ids: Sequence[str]) -> None:
        """Draws, judges and keeps what the store lacks of a block, as a writer of its own. What an earlier
        try of the block wrote is done. Raises UserErrors."""
        with self._writer(block) as writer:
            job = self._prepared(writer)
            work = TeacherWork(
                job,
                [self._problems[problem_id] for problem_id in problem_ids],
                writer.done(job.name),
                verifier=self._judge(),
                filters=self._task.config.filters,
                reporter=_BlockReporter(block, self._tell),
            )
            if work.left:
                work.fill_prompts()
                work.run(self._loaded(job), writer.append, self._task.config.store)
            self._tell.progress(block, work.progress())

    def _writer(self, block: int) -> StoreWriter:
        """Sure to be alone: were this block still in the hands of a worker that is not dead after all, its
        samples would be drawn twice. Raises StoreBusyError after LOCK_SECONDS."""

        return waited(
            lambda: StoreWriter.open(
                self._task.config.store.path,
                verifier=VERIFIER_NAME,
                verifier_version=VERIFIER_VERSION,
                shard=block_shard(block),
            ),
            seconds=LOCK_SECONDS,
        )

    def _prepared(self, writer: StoreWriter) -> Job:
        if self._job is None:
            self._problems = {problem.problem_id: problem for problem in read_problems(writer.path)}
            self._job = _job(self._task)
        return self._job

    def _judge(self) -> Verifier:
        if self._verifier is None:
            self._verifier = self._stack.enter_context(Verifier.configured(self._task.config.verify))
        return self._verifier

    def _loaded(self, job: Job) -> Engine:
        if self._engine is None:
            self._engine = load_engine(
                job.config,
                job.engine,
                job.tokenizer,
                longest_prompt=self._task.longest_prompt,
                report=self._tell.message,
            )
            self._stack.enter_context(closing(self._engine))
        return self._engine

    def close(self) -> None:
        """Lets the model and the verifier go."""
        self._stack.close()


def block_shard(block: int) -> str:
    """The name of a block's writer in the store."""
    return f"ray-{block}"


def waited(open_writer: Callable[[], StoreWriter], *, seconds: float) -> StoreWriter:
    """The writer, once nobody else is in its place. Raises StoreBusyError after so many seconds."""

    deadline = time.monotonic() + seconds
    while True:
        try:
            return open_writer()
        except StoreBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _job(task: BlockTask) -> Job:
    """EngineError when this machine has another tokenizer or another engine than the record says."""

    tokenizer = load_tokenizer(task.teacher)
    here = replace(
        task.record,
        engine_version=prepare_engine(task.teacher, task.engine),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    for field in ("engine_version", "tokenizer_fingerprint"):
        mine, right = getattr(here, field), getattr(task.record, field)
        if mine != right:
            raise EngineError(
                f"teacher {task.record.name!r}: {field} is {mine} on a worker and {right} where the run was "
                "started; every machine of the cluster needs the same packages and models"
            )
    return Job(config=task.teacher, engine=task.engine, tokenizer=tokenizer, record=task.record)


class _BlockReporter(SilentReporter):
    """Passes a block's progress on, not more often than anybody looks."""

    def __init__(self, block: int, tell: Tell) -> None:
        self._block = block
        self._tell = tell
        self._last = 0.0

    def message(self, text: str) -> None:
        """At once."""
        self._tell.message(text)

    def progress(self, progress: TeacherProgress) -> None:
        """Now and then."""
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self._last = time.monotonic()
            self._tell.progress(self._block, progress)
