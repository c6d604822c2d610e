"""`--engine ray`: the same plan on the workers of a Ray cluster that is running already.

driver: problems --blocks of ids--> Ray Data actors: engine -> verifier -> parts, in the store that all share
        progress <-- tally actor <-------------'

Each worker runs one of our own engines, so that samples, seeds and stopping are those of a run on one
machine. A block is its own writer of the store: what a killed worker wrote is done, and whoever gets its
block next goes on from there. Every machine needs the store's and the models' directories under the same
paths, and the same packages.
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
import ray.data
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from precompute.config import PrecomputeConfig, RayConfig, TeacherConfig
from precompute.engines.registry import engine_version, resolve_engine
from precompute.run.block_progress import Tally, TallyTell, Told, Watch
from precompute.run.block_work import BlockTask, BlockWorker, block_shard
from precompute.run.draws import next_samples
from precompute.run.plan import TeacherOutcome, stored_counts
from precompute.run.progress import Reporter
from precompute.run.solve import Job, fill_prompts, longest_prompt
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

ANSWER_SECONDS = 20.0
"""How long a cluster may take to answer at all."""

CPUS_LEFT = 1
"""For Ray Data itself: workers that hold every CPU would wait for data that nobody brings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one worker takes of a machine."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"


@contextmanager
def connected(config: PrecomputeConfig, reporter: Reporter) -> Iterator[RayPlace]:
    """The cluster at RAY_ADDRESS, or else the one that was started on this machine; none is started here.

    Leaving ends this run's workers and nothing else. Raises EngineError when there is none.
    """
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    try:
        # Its core would print a warning about the workers' arguments, which Ray Data keeps alive.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineError(NO_CLUSTER.format(reason=reason)) from None
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        place = RayPlace(config.ray, machines())
        reporter.message(str(place))
        yield place
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself would try for minutes to reach a cluster that is gone. Raises EngineError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        reason = f"RAY_ADDRESS = {address}: {error.strerror or error}"
        raise EngineError(NO_CLUSTER.format(reason=reason)) from None


def machines() -> list[Mapping[str, float]]:
    """What each living machine of the cluster has, e.g. {"CPU": 16.0, "GPU": 1.0}."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(machines: Sequence[Mapping[str, float]], needs: Needs) -> int:
    """How many workers fit on the machines, each whole on one of them, with CPUS_LEFT to spare."""

    def fitting(machine: Mapping[str, float]) -> int:
        fit = math.floor(machine.get("CPU", 0) / needs.cpus)
        return min(fit, math.floor(machine.get("GPU", 0) / needs.gpus)) if needs.gpus else fit

    spare = sum(machine.get("CPU", 0) for machine in machines) - CPUS_LEFT
    return max(min(sum(map(fitting, machines)), math.floor(spare / needs.cpus)), 0)


def blocks_of(problem_ids: Sequence[str], *, workers: int, largest: int) -> list[list[str]]:
    """Blocks of at most `largest`, and at least one for every worker where there are problems enough."""
    size = max(min(largest, math.ceil(len(problem_ids) / workers)), 1)
    return [list(problem_ids[start : start + size]) for start in range(0, len(problem_ids), size)]


class RayPlace:
    """A cluster at work; see `precompute.run.places.Place`."""

    shard = "ray"
    """Two runs on a cluster would do the same twice: the second finds the store busy."""

    def __init__(self, config: RayConfig, machines: Sequence[Mapping[str, float]]) -> None:
        self._config = config
        self._machines = machines

    def __str__(self) -> str:
        cpus, gpus = (sum(machine.get(kind, 0) for machine in self._machines) for kind in ("CPU", "GPU"))
        return f"Ray cluster: {len(self._machines)} machines, {cpus:g} CPUs, {gpus:g} GPUs"

    def engine_of(self, teacher: TeacherConfig) -> str:
        """As the workers allow: auto is vllm where they have GPUs. Raises EngineError."""
        if teacher.engine == "openai":
            raise EngineError(
                f"teacher {teacher.name!r}: its servers draw, and workers of a cluster have nothing to do; "
                f"run it with --teacher {teacher.name} and without --engine ray"
            )
        if teacher.engine != "auto":
            return resolve_engine(teacher.engine)
        return "vllm" if self.needs(teacher).gpus and find_spec("vllm") else "transformers"

    def version_of(self, teacher: TeacherConfig, engine: str) -> str:
        """Of the driver's engine; the workers, which have the GPUs, check theirs. Raises EngineError where no
        worker fits."""
        if not room(self._machines, self.needs(teacher)):
            raise EngineError(
                f"teacher {teacher.name!r}: no machine of the cluster has room for a worker of "
                f"{self.needs(teacher)} beside {CPUS_LEFT} CPU for Ray Data ({self}); see "
                "ray.num_cpus_per_worker and ray.num_gpus_per_worker"
            )
        return engine_version(engine)

    def needs(self, teacher: TeacherConfig) -> Needs:
        """Of one of its workers."""
        gpus = self._config.num_gpus_per_worker
        if gpus is None:
            has = any(machine.get("GPU", 0) for machine in self._machines)
            gpus = float(teacher.tensor_parallel_size) if has else 0.0
        return Needs(cpus=self._config.num_cpus_per_worker, gpus=gpus)

    def solve(
        self,
        job: Job,
        problems: Sequence[Problem],
        config: PrecomputeConfig,
        writer: StoreWriter,
        verifier: Verifier,
        reporter: Reporter,
    ) -> TeacherOutcome:
        """Has the workers draw, judge and keep what the store lacks of one teacher. Raises the EngineError of
        a worker, and one where workers keep dying."""
        started = time.monotonic()
        done = writer.done(job.name)
        before = _counts(writer.path, job, problems)
        left = [p for p in problems if next_samples(job.config, done.get(p.problem_id, {}))]
        watch = Watch(job, problems, done, reporter)
        if left:
            task = _task(job, config, writer, longest_prompt(fill_prompts(job, left, reporter)))
            self._run(task, [problem.problem_id for problem in left], watch, reporter)
            _remove_locks(writer.path)
        reporter.finished(watch.progress())
        after = _counts(writer.path, job, problems)
        return TeacherOutcome(
            name=job.name,
            model=job.config.model,
            engine=job.engine,
            new_samples=after["samples"] - before["samples"],
            new_tokens=after["tokens"] - before["tokens"],
            seconds=time.monotonic() - started,
        )

    def _run(self, task: BlockTask, problem_ids: Sequence[str], watch: Watch, reporter: Reporter) -> None:
        needs = self.needs(task.teacher)
        fitting = room(machines(), needs)
        wanted = self._config.num_workers or max(fitting, 1)
        blocks = blocks_of(problem_ids, workers=wanted, largest=self._config.problems_per_task)
        workers = min(wanted, len(blocks))
        reporter.message(
            f"{task.record.name}: {len(blocks)} blocks for {workers} workers of {needs} with {task.engine}"
            + (f"; there is room for {fitting} now" if workers > fitting else "")
        )
        watch.plan(blocks)
        tally = _tally()
        rows = ray.data.from_items(
            [{"block": number, "problem_ids": ids} for number, ids in enumerate(blocks)],
            override_num_blocks=len(blocks),
        ).map_batches(
            RayWorker,
            fn_constructor_args=(task, tally),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
        )
        with watch.following(lambda: _take(tally)):
            for row in rows.iter_rows():
                if row["error"]:
                    raise EngineError(row["error"])


class RayWorker:
    """What Ray Data calls with one row at a time; a user's error travels back as a row."""

    def __init__(self, task: BlockTask, tally: Any) -> None:
        self._worker = BlockWorker(task, TallyTell(tally))
        self._most_tries = 1 + task.config.ray.max_task_retries
        self._tally = tally

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """{"block": [1], "problem_ids": [1, n]} -> {"block": [1], "error": [1]}; no error is ""."""
        block, problem_ids = int(batch["block"][0]), [str(each) for each in batch["problem_ids"][0]]
        error = ""
        try:
            self._begin(block)
            self._worker.solve(block, problem_ids)
        except UserError as failure:
            error = str(failure)
        return {"block": [block], "error": [error]}

    def _begin(self, block: int) -> None:
        """Ray Data itself would start dying workers again for ever."""
        try:
            tries: int = ray.get(self._tally.begin.remote(block))
        except ray.exceptions.RayError:
            return  # the tally's machine is gone
        if tries > self._most_tries:
            raise EngineError(
                f"block {block} was given up: {self._most_tries} workers died over it, out of memory? A "
                "smaller batch_size or more of a machine for each worker (ray.num_cpus_per_worker) may help; "
                f"ray.max_task_retries = {self._most_tries - 1} says when to give up"
            )


def _tally() -> Any:
    """On the driver's machine: it goes when that goes, and no sooner."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Tally).remote()


def _take(tally: Any) -> Told:
    try:
        told: Told = ray.get(tally.take.remote())
    except ray.exceptions.RayError:
        return {}, []  # its machine is gone; the work goes on unseen
    return told


def _task(job: Job, config: PrecomputeConfig, writer: StoreWriter, longest: int) -> BlockTask:
    """With paths from the root: a worker has another directory."""
    model = Path(job.config.model)
    teacher = job.config.model_copy(
        update={"model": str(model.absolute()) if model.exists() else job.config.model}
    )
    store = config.store.model_copy(update={"path": str(writer.path)})
    return BlockTask(
        config=config.model_copy(update={"store": store}),
        teacher=teacher,
        engine=job.engine,
        record=job.record,
        longest_prompt=longest,
    )


def _counts(path: Path, job: Job, problems: Sequence[Problem]) -> dict[str, int]:
    with TraceStore(path) as store:
        counts = stored_counts(store, [problem.problem_id for problem in problems])
    return {"samples": 0, "tokens": 0} | counts.get(job.name, {})


def _remove_locks(path: Path) -> None:
    """Of the blocks, all of which are done."""
    for lock in path.glob(shard_lock(block_shard(0)).replace("0", "*")):
        lock.unlink(missing_ok=True)
