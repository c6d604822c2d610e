"""`--engine ray`: the same run on the workers of a Ray cluster that is already up.

    driver --blocks of problems--> actors: engine -> verifier -> parts, in the store that all share

Each worker runs one of our own engines, so that samples, seeds and stopping are those of a run on one
machine. Each worker is a writer of its own in the store: when it dies, Ray starts it again with the block it
had, and it continues from the parts. The driver reads the progress from the store. Every machine needs the
store's and the models' directories under the same paths, and the same packages.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec

import ray
import ray.exceptions
from ray.util import ActorPool

from precompute.config import PrecomputeConfig, RayConfig, TeacherConfig
from precompute.engines import Engine
from precompute.engines.registry import engine_version, load_engine, prepare_engine, resolve_engine
from precompute.run.backends import Backend
from precompute.run.plan import stored_counts
from precompute.run.progress import Reporter, TeacherProgress
from precompute.run.solve import PreparedTeacher, Solver, fill_prompts, longest_prompt, samples_left
from precompute.verify.verifier import Verifier
from store.errors import EngineError, StoreBusyError, UserError
from store.records import Problem
from store.writer import StoreWriter

NO_CLUSTER = (
    "--engine ray found no Ray cluster to connect to ({reason}); start one with `ray start --head` (and "
    "`ray start --address=HOST:6379` on further machines), or set RAY_ADDRESS=HOST:6379"
)
CONNECT_SECONDS = 20.0
"""Longest wait for a cluster's first answer."""
LOCK_SECONDS = 120.0
"""Longest wait for a worker's lock: over a network file system a lock outlives a dead machine."""
PROGRESS_SECONDS = 5.0
"""Between two looks into the store."""

Machine = Mapping[str, float]
"""Resources of a machine, e.g. {"CPU": 16.0, "GPU": 1.0}"""


@contextmanager
def connected(config: RayConfig, reporter: Reporter) -> Iterator[RayBackend]:
    """Connects to the cluster at RAY_ADDRESS, or else to the one on this machine; starts none.

    Leaving ends this run's workers and nothing else. Raises EngineError without a cluster.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for minutes to reach a cluster that is gone
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{address} " + " ".join(str(error).split())[:300]
        raise EngineError(NO_CLUSTER.format(reason=reason.strip())) from None
    try:
        backend = RayBackend(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        reporter.message(str(backend))
        yield backend
    finally:
        ray.shutdown()


def room(machines: Sequence[Machine], cpus: float, gpus: float) -> int:
    """Returns how many workers fit on the machines; a worker is on one machine."""
    by_cpus = [math.floor(machine.get("CPU", 0) / cpus) for machine in machines]
    by_gpus = [math.floor(machine.get("GPU", 0) / gpus) if gpus else math.inf for machine in machines]
    return int(sum(map(min, by_cpus, by_gpus)))


def blocks_of(problems: Sequence[Problem], *, workers: int, largest: int) -> list[Sequence[Problem]]:
    """Returns blocks of at most `largest` problems, and one for every worker where the problems suffice."""
    size = max(min(largest, math.ceil(len(problems) / workers)), 1)
    return [problems[start : start + size] for start in range(0, len(problems), size)]


class RayBackend(Backend):
    """The workers of a cluster."""

    def __init__(self, config: RayConfig, machines: Sequence[Machine]) -> None:
        # Two runs on a cluster would take the same samples twice: the second finds this shard busy.
        super().__init__(shard="ray")
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
        cpus, gpus = self.needs(teacher)
        engine = "vllm" if gpus and find_spec("vllm") else "transformers"
        if teacher.engine != "auto":
            engine = resolve_engine(teacher.engine)
        if not room(self._machines, cpus, gpus):
            raise EngineError(
                f"teacher {teacher.name!r}: no machine of the cluster has room for a worker of {cpus:g} CPU "
                f"and {gpus:g} GPU ({self}); see ray.num_cpus_per_worker and ray.num_gpus_per_worker"
            )
        return engine, engine_version(engine)

    def needs(self, teacher: TeacherConfig) -> tuple[float, float]:
        """Returns (CPUs, GPUs) of one of the teacher's workers."""
        gpus = self._config.num_gpus_per_worker
        if gpus is None:
            gpus = teacher.tensor_parallel_size if any(each.get("GPU") for each in self._machines) else 0
        return self._config.num_cpus_per_worker, gpus

    def solve(
        self,
        teacher: PreparedTeacher,
        problems: Sequence[Problem],
        config: PrecomputeConfig,
        writer: StoreWriter,
        verifier: Verifier,
        reporter: Reporter,
    ) -> None:
        """Lets the workers add the samples of one teacher that the store lacks.

        Raises the UserError of a worker, and EngineError where workers keep dying.
        """
        started, before = time.monotonic(), stored_counts(writer.path, problems)[teacher.name]

        def report(*, last: bool = False) -> None:
            found = writer.done(teacher.name)
            done = [found.get(problem.problem_id, {}) for problem in problems]
            now = stored_counts(writer.path, problems)[teacher.name]
            progress = TeacherProgress(
                teacher=teacher.name,
                done=sum(map(len, done)),
                total=sum(len(samples) + samples_left(teacher.config, samples) for samples in done),
                new=now.traces - before.traces,
                verified=now.verified - before.verified,
                filtered=now.filtered - before.filtered,
                tokens=now.tokens - before.tokens,
                seconds=time.monotonic() - started,
            )
            reporter.progress(progress, last=last)

        done = writer.done(teacher.name)
        left = [p for p in problems if samples_left(teacher.config, done.get(p.problem_id, {}))]
        if left:
            prompts = fill_prompts(teacher, left, done, reporter)
            left = [problem for problem in left if problem.problem_id in prompts]
        if left:
            longest = longest_prompt(prompts)
            store = config.store.model_copy(update={"path": str(writer.path)})
            setup = (_portable(teacher), config.model_copy(update={"store": store}), longest)
            self._run(setup, left, reporter, report)
        report(last=True)

    def _run(
        self,
        setup: tuple[PreparedTeacher, PrecomputeConfig, int],
        problems: Sequence[Problem],
        reporter: Reporter,
        report: Callable[[], None],
    ) -> None:
        """Gives the workers one block after another, and calls `report` now and then."""
        teacher = setup[0]
        cpus, gpus = self.needs(teacher.config)
        wanted = self._config.num_workers or room(self._machines, cpus, gpus)
        blocks = blocks_of(problems, workers=wanted, largest=self._config.problems_per_task)
        count = min(wanted, len(blocks))
        reporter.message(
            f"{teacher.name}: {len(blocks)} blocks for {count} workers of {cpus:g} CPU and {gpus:g} GPU with "
            f"{teacher.engine}"
        )
        actor_class = ray.remote(Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=self._config.max_task_retries
        )
        actors = [actor_class.remote(number, *setup) for number in range(count)]
        pool = ActorPool(actors)
        for block in blocks:
            pool.submit(lambda actor, block: actor.solve.remote(block), block)
        try:
            while pool.has_next():
                try:
                    if message := pool.get_next_unordered(timeout=PROGRESS_SECONDS):
                        reporter.message(message)
                except TimeoutError:
                    pass
                report()
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except ray.exceptions.RayError:
            tries = self._config.max_task_retries
            raise EngineError(
                f"a block of problems was given up: {tries + 1} workers died over it (ray.max_task_retries = "
                f"{tries}), out of memory? Try a smaller batch_size or a larger ray.num_cpus_per_worker"
            ) from None
        finally:
            for actor in actors:
                ray.kill(actor)


class Worker:
    """An actor with the teacher's model. When it dies, Ray starts it again and repeats its call."""

    def __init__(self, number: int, teacher: PreparedTeacher, config: PrecomputeConfig, longest: int) -> None:
        """`longest` is the longest prompt of all blocks in tokens: the engine is loaded once."""
        self._shard = f"ray-{number}"
        self._teacher = teacher
        self._config = config
        self._longest = longest
        self._verifier = Verifier(config.verify)
        self._restarted: bool = ray.get_runtime_context().was_current_actor_reconstructed

    def solve(self, problems: Sequence[Problem]) -> str:
        """Adds the samples of a block that the store lacks. Returns a message for the user, or "".

        Raises UserErrors.
        """
        solver = Solver(
            self._teacher,
            problems,
            self._writer.done(self._teacher.name),
            verifier=self._verifier,
            filters=self._config.filters,
            reporter=Reporter(),
        )
        solver.fill_prompts()
        if solver.left:
            solver.run(self._engine, self._writer.append, self._config.store)
        restarted, self._restarted = self._restarted, False
        lines = ["a worker died; another continued its block" if restarted else "", solver.failed_line()]
        return "; ".join(filter(None, lines))

    @cached_property
    def _writer(self) -> StoreWriter:
        """Waits for the lock: the machine of this worker's predecessor may not be known to be dead yet."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                # The run that started this worker has recorded the verifiers.
                return StoreWriter.open(self._config.store.path, verifiers={}, shard=self._shard)
            except StoreBusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    @cached_property
    def _engine(self) -> Engine:
        """Raises EngineError if this machine has another version of the engine than the driver."""
        teacher, needed = self._teacher, self._teacher.record.engine_version
        found = prepare_engine(teacher.config, teacher.engine)
        if found != needed:
            raise EngineError(
                f"teacher {teacher.name!r}: {teacher.engine} is {found} on a worker and {needed} where the "
                "run was started; every machine of the cluster needs the same packages"
            )
        return load_engine(teacher.config, teacher.engine, teacher.tokenizer, longest_prompt=self._longest)


def _portable(teacher: PreparedTeacher) -> PreparedTeacher:
    """Returns the teacher with an absolute path: a worker has another working directory."""
    if not os.path.exists(teacher.config.model):
        return teacher
    path = os.path.abspath(teacher.config.model)
    return replace(teacher, config=teacher.config.model_copy(update={"model": path}))
