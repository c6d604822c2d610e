"""A run's directory: everything that a run leaves on disk.

    config.toml  env.json  log.txt  metrics.jsonl  fork.json (of a fork)
    rollouts/step-000001.parquet     every sample, and every trace that replaced one
    queries/step-000001.parquet      every candidate of every queried problem
    evals/step-000010.parquet        every sample of an evaluation
    failed/step-000012.parquet       the batch of a non-finite loss or gradient, where there was one
    checkpoints/step-000050/         see `checkpoint`; sft-000050 for SFT

A step's files are named by the step, so a resumed run overwrites those of an interrupted one.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from precompute.config_file import toml_of
from store.errors import RunError
from store.format.files import FileLock, disk_errors_named, whole_file
from trainer.config import Config
from trainer.evaluation import EvalSample
from trainer.method.groups import Group, Sample
from trainer.method.guidance import QueryRow
from trainer.student.batches import TrainSequence
from trainer.telemetry.metrics import read_metrics

logger = logging.getLogger("ampo")
# Before a run has its log file, Python would repeat warnings on stderr.
logger.addHandler(logging.NullHandler())

ARROW_TYPES = {
    "str": pa.string(),
    "int": pa.int32(),
    "bool": pa.bool_(),
    "float": pa.float64(),
    "tuple[int, ...]": pa.list_(pa.int32()),
    "tuple[float, ...]": pa.list_(pa.float64()),
}
"""Annotation of a record's field -> type of its column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """A sample of the student, or a trace that replaced it and has the sample's index."""

    problem_id: str
    sample_index: int
    origin: str
    """`student` or `teacher`."""
    trace_id: str | None
    teacher: str | None
    replaced: bool
    """True for a sample that a trace replaced."""
    is_correct: bool
    has_format: bool
    reward: float
    advantage: float | None
    """None for a replaced sample."""
    n_tokens: int
    finish_reason: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Position:
    """Progress of a run; ordered."""

    step: int = 0
    """Sampling steps done."""
    sft_step: int = 0
    """SFT steps done, all of which come before the first sampling step."""

    def __str__(self) -> str:
        return f"SFT step {self.sft_step}" if self.sft_step and not self.step else f"step {self.step}"

    @property
    def name(self) -> str:
        """Name of its checkpoint and its files."""
        return f"step-{self.step:06d}" if self.step else f"sft-{self.sft_step:06d}"

    @classmethod
    def of(cls, path: Path) -> Self:
        """Reads the name of a checkpoint or of a step's file."""
        kind, _, number = path.stem.partition("-")
        return cls(step=int(number)) if kind == "step" else cls(sft_step=int(number))


class RunFiles:
    """Writes a run's files; each appears whole."""

    def __init__(self, root: Path, *, writes: bool = True) -> None:
        """`writes`: False for ranks other than 0, whose calls write nothing."""
        self.root = root
        self.writes = writes
        self.checkpoints = root / "checkpoints"

    def start(self, config: Config, *, after: Position, processes: int = 1) -> None:
        """Writes config and environment, and drops what an interrupted run logged past `after`.

        The evaluation between SFT and the first sampling step is past both, and repeated.
        """
        if not self.writes:
            return
        last = after.step or -1
        for name in ("rollouts", "queries", "evals", "checkpoints"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            for file in (self.root / name).glob("step-*.parquet"):
                if file.stem.removeprefix("step-").isdecimal() and Position.of(file).step > last:
                    file.unlink()
        kept = [
            row
            for row in read_metrics(self.root)
            if (row["sft/step"] <= after.sft_step if "sft/step" in row else row["step"] <= last)
        ]
        environment = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processes": processes,
            "packages": dict(sorted((package.name, package.version) for package in distributions())),
        }
        texts = {
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in kept),
            "config.toml": toml_of(config),
            "env.json": json.dumps(environment, indent=2) + "\n",
        }
        for name, text in texts.items():
            with whole_file(self.root / name) as written:
                written.write(text.encode("utf-8"))

    def write_fork(self, start: Path, changed: Sequence[str]) -> None:
        """Writes the checkpoint of another run that this one begins with, and the changed keys."""
        if self.writes:
            body = json.dumps({"of": str(start), "changed": list(changed)}, indent=2) + "\n"
            (self.root / "fork.json").write_text(body, encoding="utf-8")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the directory, and writes every line of the `ampo` logger to log.txt, for the block.

        Raises RunError when another process trains the run, or when it cannot be written.
        """
        if not self.writes:
            yield
            return
        lock = FileLock(self.root / ".train.lock")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            is_held = lock.acquire(wait=False)
        except OSError as error:
            raise RunError(f"run.dir: cannot write {self.root}: {error.strerror or error}") from error
        if not is_held:
            raise RunError(
                f"{self.root} is being trained by process {lock.holder() or 'unknown'}; wait for it to end, "
                "or give this run another run.name"
            )
        handler = logging.FileHandler(self.root / "log.txt", encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()
            lock.release()

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends one step's line. Raises StoreError when the disk is full."""
        path = self.root / "metrics.jsonl"
        if self.writes:
            with disk_errors_named(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def write_step(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float]],
        queries: Sequence[QueryRow] | None,
    ) -> None:
        """Writes rollouts and queries.

        Args:
            advantages: of each group's members.
            queries: None where the store is never queried.
        """
        if not self.writes:
            return
        rollouts = [
            RolloutRow(
                problem_id=group.problem_id,
                sample_index=index,
                origin="teacher" if member.is_teacher else "student",
                trace_id=member.trace_id,
                teacher=member.teacher,
                replaced=advantage is None,
                is_correct=member.is_correct,
                has_format=member.has_format,
                reward=member.reward,
                advantage=advantage,
                n_tokens=len(member.token_ids),
                finish_reason=member.finish_reason,
                text=member.text,
            )
            for group, values in zip(groups, advantages, strict=True)
            for index, member, advantage in _with_advantages(group, values)
        ]
        name = f"step-{step:06d}.parquet"
        write_rows(self.root / "rollouts" / name, RolloutRow, rollouts, step=step)
        if queries is not None:
            write_rows(self.root / "queries" / name, QueryRow, queries, step=step)

    def write_evaluation(self, step: int, samples: Sequence[EvalSample]) -> None:
        """Writes the rows of `ampo eval`, with the step."""
        if self.writes:
            write_rows(self.root / "evals" / f"step-{step:06d}.parquet", EvalSample, samples, step=step)

    def write_failed_batch(self, step: Position, sequences: Sequence[TrainSequence]) -> Path:
        """Writes the sequences of a non-finite step, one a row; returns the file."""
        path = self.root / "failed" / f"{step.name}.parquet"
        if self.writes:
            write_rows(path, TrainSequence, sequences, step=step.step)
        return path


def _with_advantages(group: Group, values: Sequence[float]) -> Iterator[tuple[int, Sample, float | None]]:
    """Yields index, sample and advantage of all samples and traces; None for samples that do not train."""
    trained = iter(values)
    for index, sample in enumerate(group.samples):
        trace = group.guidance.get(index)
        yield index, sample, None if trace or not group.own_train else next(trained)
        if trace:
            yield index, trace, next(trained)
    for index, trace in enumerate(group.extra, start=len(group.samples)):
        yield index, trace, next(trained)


def write_rows(path: Path, record: type, rows: Iterable[Any], *, step: int) -> None:
    """Writes a Parquet file of the step and records of the dataclass `record`."""
    columns = {field.name: ARROW_TYPES[str(field.type).removesuffix(" | None")] for field in fields(record)}
    schema = pa.schema({"step": pa.int32(), **columns})
    table = pa.Table.from_pylist([{"step": step, **asdict(row)} for row in rows], schema=schema)
    with whole_file(path) as file:
        pq.write_table(table, file, compression="zstd")
