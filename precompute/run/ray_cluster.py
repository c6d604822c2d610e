"""`--engine ray`: the same run on the workers of a Ray cluster that is already up.

driver: problems --blocks of ids--> actors: engine -> verifier -> parts, in the store that all share
        progress <-----queue-----------'

Each worker runs one of our own engines, so that samples, seeds and stopping are those of a run on one
machine. Each block is a writer of its own in the store: when a worker dies, Ray starts it again with the
block it had, and it goes on from the parts of that block. Every machine needs the store's and the models'
directories under the same paths, and the same packages.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util import ActorPool
from ray.util.queue import Queue

from precompute.config import PrecomputeConfig, RayConfig, TeacherConfig
from precompute.engines.registry import engine_version, resolve_engine
from precompute.run.plan import TeacherOutcome, stored_counts
from precompute.run.progress import Reporter, TeacherProgress
from precompute.run.ray_worker import REPORT_SECONDS, BlockWorker, WorkerSetup, block_shard
from precompute.run.solve import Done, PreparedTeacher, fill_prompts, longest_prompt, samples_left
from precompute.verify.verifier import Verifier
from store.errors import EngineError, UserError
from store.format.files import shard_lock
from store.reader import TraceStore
from store.records import Problem
from store.writer import StoreWriter

NO_CLUSTER = (
    "--engine ray found no Ray cluster to connect to ({reason}); start one with `ray start --head` (and "
    "`ray start --address=HOST:6379` on further machines), or set RAY_ADDRESS=HOST:6379"
)
CONNECT_SECONDS = 20.0
"""Longest wait for a cluster's first answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Resources of one worker."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"


@contextmanager
def connected(config: PrecomputeConfig, reporter: Reporter) -> Iterator[RayBackend]:
    """Connects to the cluster at RAY_ADDRESS, or else to the one on this machine; starts none.

    Leaving ends this run's workers and nothing else. Raises EngineError without a cluster.
    """
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineError(NO_CLUSTER.format(reason=reason)) from None
    try:
        backend = RayBackend(config.ray, machines())
        reporter.message(str(backend))
        yield backend
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raises EngineError at once where Ray would try for minutes to reach a cluster that is gone."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = f"RAY_ADDRESS = {address}: {error.strerror or error}"
        raise EngineError(NO_CLUSTER.format(reason=reason)) from None


def machines() -> list[Mapping[str, float]]:
    """Returns the resources of each living machine of the cluster, e.g. {"CPU": 16.0, "GPU": 1.0}."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(machines: Sequence[Mapping[str, float]], needs: Needs) -> int:
    """Returns how many workers fit on the machines; a worker is on one machine."""

    def fitting(machine: Mapping[str, float]) -> int:
        fit = math.floor(machine.get("CPU", 0) / needs.cpus)
        return min(fit, math.floor(machine.get("GPU", 0) / needs.gpus)) if needs.gpus else fit

    return sum(map(fitting, machines))


def blocks_of(problem_ids: Sequence[str], *, workers: int, largest: int) -> list[list[str]]:
    """Returns blocks of at most `largest` problems, and one for every worker where the problems suffice."""
    size = max(min(largest, math.ceil(len(problem_ids) / workers)), 1)
    return [list(problem_ids[start : start + size]) for start in range(0, len(problem_ids), size)]


class RayBackend:
    """A cluster as a backend (`precompute.run.backends.Backend`)."""

    shard = "ray"
    """Two runs on a cluster would take the same samples twice: the second finds the store busy."""

    def __init__(self, config: RayConfig, machines: Sequence[Mapping[str, float]]) -> None:
        self._config = config
        self._machines = machines

    def __str__(self) -> str:
        cpus, gpus = (sum(machine.get(kind, 0) for machine in self._machines) for kind in ("CPU", "GPU"))
        return f"Ray cluster: {len(self._machines)} machines, {cpus:g} CPUs, {gpus:g} GPUs"

    def engine_of(self, teacher: TeacherConfig) -> tuple[str, str]:
        """Returns the workers' engine (auto is vllm where they have GPUs) and the driver's version of it; the
        workers, which have the GPUs, check theirs. Raises EngineError, also where no worker fits."""
        if teacher.engine == "openai":
            raise EngineError(
                f"teacher {teacher.name!r}: its servers sample, and workers of a cluster have nothing to do; "
                f"run it with --teacher {teacher.name} and without --engine ray"
            )
        engine = "vllm" if self.needs(teacher).gpus and find_spec("vllm") else "transformers"
        if teacher.engine != "auto":
            engine = resolve_engine(teacher.engine)
        if not room(self._machines, self.needs(teacher)):
            raise EngineError(
                f"teacher {teacher.name!r}: no machine of the cluster has room for a worker of "
                f"{self.needs(teacher)} ({self}); see ray.num_cpus_per_worker and ray.num_gpus_per_worker"
            )
        return engine, engine_version(engine)

    def needs(self, teacher: TeacherConfig) -> Needs:
        """Returns the resources of one of the teacher's workers."""
        gpus = self._config.num_gpus_per_worker
        if gpus is None:
            has = any(machine.get("GPU", 0) for machine in self._machines)
            gpus = float(teacher.tensor_parallel_size) if has else 0.0
        return Needs(cpus=self._config.num_cpus_per_worker, gpus=gpus)

    def solve(
        self,
        teacher: PreparedTeacher,
        problems: Sequence[Problem],
        config: PrecomputeConfig,
        writer: StoreWriter,
        verifier: Verifier,
        reporter: Reporter,
    ) -> TeacherOutcome:
        """Lets the workers add the samples that the store lacks of one teacher.

        Raises the EngineError of a worker, and one where workers keep dying.
        """
        started = time.monotonic()
        done = writer.done(teacher.name)
        before = _counts(writer.path, teacher, problems)
        left = [p for p in problems if samples_left(teacher.config, done.get(p.problem_id, {}))]
        progress = ClusterProgress(teacher, problems, done)
        if left:
            setup = _setup(teacher, config, writer, longest_prompt(fill_prompts(teacher, left, reporter)))
            self._run(setup, [problem.problem_id for problem in left], progress, reporter)
            for lock in writer.path.glob(shard_lock(block_shard(0)).replace("0", "*")):
                lock.unlink(missing_ok=True)
        reporter.finished(progress.total())
        after = _counts(writer.path, teacher, problems)
        return TeacherOutcome(
            name=teacher.name,
            model=teacher.config.model,
            engine=teacher.engine,
            new_samples=after["samples"] - before["samples"],
            new_tokens=after["tokens"] - before["tokens"],
            seconds=time.monotonic() - started,
        )

    def _run(
        self, setup: WorkerSetup, problem_ids: Sequence[str], progress: ClusterProgress, reporter: Reporter
    ) -> None:
        needs, retries = self.needs(setup.teacher), self._config.max_task_retries
        fitting = room(machines(), needs)
        wanted = self._config.num_workers or max(fitting, 1)
        blocks = blocks_of(problem_ids, workers=wanted, largest=self._config.problems_per_task)
        workers = min(wanted, len(blocks))
        reporter.message(
            f"{setup.record.name}: {len(blocks)} blocks for {workers} workers of {needs} with {setup.engine}"
            + (f"; there is room for {fitting} now" if workers > fitting else "")
        )
        progress.begin(blocks)
        queue = Queue(actor_options={"num_cpus": 0})
        actor_class = ray.remote(RayWorker).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=-1, max_task_retries=retries
        )
        actors = [actor_class.remote(setup, queue) for _ in range(workers)]
        pool = ActorPool(actors)
        for block in enumerate(blocks):
            pool.submit(lambda actor, block: actor.solve.remote(*block), block)
        try:
            while pool.has_next():
                if error := _next_error(pool, retries):
                    raise EngineError(error)
                _take_reports(queue, progress, reporter)
        finally:
            for actor in actors:
                ray.kill(actor)


class RayWorker:
    """An actor; Ray starts it again when it dies, and then repeats the call that it had."""

    def __init__(self, setup: WorkerSetup, queue: Queue) -> None:
        self._queue = queue
        self._worker = BlockWorker(setup, self._report)
        self._restarted: bool = ray.get_runtime_context().was_current_actor_reconstructed

    def solve(self, block: int, problem_ids: Sequence[str]) -> str:
        """Solves a block. Returns the text of a UserError; empty without one."""
        if self._restarted:
            self._report(block, f"the worker of block {block} died; another goes on with it")
            self._restarted = False
        try:
            self._worker.solve(block, problem_ids)
        except UserError as error:
            return str(error)
        return ""

    def _report(self, block: int, report: TeacherProgress | str) -> None:
        self._queue.put_nowait((block, report))


def _next_error(pool: ActorPool, retries: int) -> str:
    """Waits for a block, at most REPORT_SECONDS; returns its error, empty without one."""
    try:
        error: str = pool.get_next_unordered(timeout=REPORT_SECONDS)
    except TimeoutError:
        return ""
    except ray.exceptions.RayError:
        return (
            f"a block of problems was given up: {retries + 1} workers died over it, out of memory? A smaller "
            "batch_size or more of a machine for each worker (ray.num_cpus_per_worker) may help; "
            f"ray.max_task_retries = {retries} limits the tries"
        )
    return error


def _take_reports(queue: Queue, progress: ClusterProgress, reporter: Reporter) -> None:
    reports = queue.get_nowait_batch(queue.qsize())
    for block, report in reports:
        if isinstance(report, str):
            reporter.message(report)
        else:
            progress.latest[block] = report
    if reports:
        reporter.progress(progress.total())


class ClusterProgress:
    """One teacher's progress: the sum over its blocks."""

    def __init__(self, teacher: PreparedTeacher, problems: Sequence[Problem], done: Done) -> None:
        self.latest: dict[int, TeacherProgress] = {}
        """block -> its latest progress"""
        self._teacher = teacher
        self._stored = {problem.problem_id: done.get(problem.problem_id, {}) for problem in problems}
        self._blocks: list[list[str]] = []
        self._started = time.monotonic()

    def begin(self, blocks: list[list[str]]) -> None:
        """Sets the problem ids of each block."""
        self._blocks = blocks

    def total(self) -> TeacherProgress:
        """Returns the sum; a block that has not begun counts with its samples of earlier runs."""
        begun = {problem_id for block in self.latest for problem_id in self._blocks[block]}
        rest = [samples for problem_id, samples in self._stored.items() if problem_id not in begun]
        stored = sum(map(len, rest))
        latest = self.latest.values()
        return TeacherProgress(
            teacher=self._teacher.name,
            done=stored + sum(each.done for each in latest),
            total=stored
            + sum(samples_left(self._teacher.config, samples) for samples in rest)
            + sum(each.total for each in latest),
            new=sum(each.new for each in latest),
            verified=sum(each.verified for each in latest),
            filtered=sum(each.filtered for each in latest),
            tokens=sum(each.tokens for each in latest),
            seconds=time.monotonic() - self._started,
        )


def _setup(
    teacher: PreparedTeacher, config: PrecomputeConfig, writer: StoreWriter, longest: int
) -> WorkerSetup:
    """Returns the setup with absolute paths: a worker has another working directory."""
    model = Path(teacher.config.model)
    path = str(model.absolute()) if model.exists() else teacher.config.model
    store = config.store.model_copy(update={"path": str(writer.path)})
    return WorkerSetup(
        config=config.model_copy(update={"store": store}),
        teacher=teacher.config.model_copy(update={"model": path}),
        engine=teacher.engine,
        record=teacher.record,
        longest_prompt=longest,
    )


def _counts(path: Path, teacher: PreparedTeacher, problems: Sequence[Problem]) -> dict[str, Any]:
    with TraceStore(path) as store:
        counts = stored_counts(store, [problem.problem_id for problem in problems])
    return {"samples": 0, "tokens": 0} | counts.get(teacher.name, {})
