"""A small world for whole training runs: a random student, a problem file, a store with traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import store_examples
import torch
from conftest import tiny_tokenizer
from safetensors.torch import load_file

from precompute.config_file import load_config
from precompute.verify.verifier import MATH_VERSIONS
from store.records import Problem, TeacherRecord, Trace
from store.writer import StoreWriter
from trainer.config import Config, GuidanceConfig, TrainConfig
from trainer.method.groups import Prompt, Sample
from trainer.method.loss import make_policy_loss
from trainer.method.update import Updater
from trainer.student.optimizer import make_optimizer
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import MEASURED
from trainer.train import TrainReport, train

PROBLEMS = [Problem(question=f"{n}+{n}", answer=str(2 * n)) for n in range(12)]


def prompt_of(problem: Problem, ids: tuple[int, ...] = (2, 3), *, opens_think: bool = False) -> Prompt:
    return Prompt(problem=problem, text="", ids=ids, opens_think=opens_think)


def sample_of(reward: float = 0.0, **changes: Any) -> Sample:
    """A student's sample, correct from a reward of 0.9 on."""
    fields: dict[str, Any] = {"token_ids": (9, 1), "text": "x", "finish_reason": "stop", "has_format": True}
    return Sample(**{**fields, "is_correct": reward >= 0.9, "reward": reward, **changes})


def updater_of(
    policy: Policy, train: TrainConfig, guidance: GuidanceConfig | None = None, **options: Any
) -> Updater:
    """An Updater with an optimizer of its own; responses have at most 32 tokens."""
    loss = make_policy_loss(train, guidance or GuidanceConfig())
    optimizer = make_optimizer(policy.model, train)
    return Updater(policy, optimizer, train, loss, **{"max_completion_length": 32, **options})


def write_problems(path: Path, problems: list[Problem]) -> None:
    rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_store(path: Path) -> None:
    """Two teachers; every third problem has no trace."""
    with StoreWriter.open(path, verifiers=MATH_VERSIONS) as writer:
        writer.write_problems(PROBLEMS)
        for name, opening in [("ada", "we add and get "), ("bob", "")]:
            writer.register_teacher(teacher(name))
            solved = [problem for index, problem in enumerate(PROBLEMS) if index % 3]
            writer.append([trace(p, name, f"{opening}\\boxed{{{p.answer}}}") for p in solved])


def make_world(path: Path) -> Path:
    """Problems and a store in the directory `path`; returns it."""
    write_problems(path / "train.jsonl", PROBLEMS)
    write_store(path / "traces")
    return path


def teacher(name: str) -> TeacherRecord:
    return store_examples.teacher(name, system_prompt="")


def trace(problem: Problem, name: str, text: str) -> Trace:
    """A verified trace of `teacher(name)`, one token a character."""
    ids = (*tiny_tokenizer()(text, add_special_tokens=False)["input_ids"], 1)
    return store_examples.trace(
        0,
        name,
        problem_id=problem.problem_id,
        text=text,
        answer=problem.answer,
        answer_start=text.index("{") + 1,
        n_tokens=len(ids),
        token_ids=ids,
        logprobs=tuple(-0.5 for _ in ids),
        generation_fingerprint=teacher(name).generation_fingerprint,
        verified_by=" ".join(*MATH_VERSIONS.items()),
    )


def settings(world: Path, model: Path, **changes: Any) -> list[str]:
    """`section__key=value` as `--set` overrides over a small run."""
    values: dict[str, Any] = {
        "problems__train": str(world / "train.jsonl"),
        "store__path": str(world / "traces"),
        "student__model": str(model),
        "student__system_prompt": "",
        "student__device": "cpu",
        "rollout__num_generations": 4,
        "rollout__max_completion_length": 24,
        "train__max_steps": 4,
        "train__problems_per_step": 4,
        "train__mini_batch_problems": 2,
        "train__learning_rate": 1e-3,
        "eval__every": 0,
        "run__dir": str(world / "runs"),
        "run__name": "run",
        "run__save_every": 2,
        "verify__workers": 1,
        **changes,
    }
    return [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]


def config_of(world: Path, model: Path, **changes: Any) -> Config:
    return load_config(Config, None, settings(world, model, **changes))


def run(world: Path, model: Path, *, resume: str = "auto", **changes: Any) -> TrainReport:
    """Trains by `config_of` of the same arguments."""
    return train(config_of(world, model, **changes), resume=resume, reporter=TrainReporter())


def rows_of(run_dir: Path, folder: str) -> dict[str, list[dict[str, Any]]]:
    """File name -> rows, without what a clock wrote."""
    found = {}
    for path in sorted((run_dir / folder).glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        found[path.name] = [{k: v for k, v in row.items() if k != "latency_ms"} for row in rows]
    return found


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock or a meter wrote."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def weights_of(run_dir: Path, name: str) -> dict[str, bytes]:
    """The bytes of every weight in a checkpoint, adapters or all."""
    (file,) = (run_dir / "checkpoints" / name).glob("*model.safetensors")
    return {key: weight.numpy().tobytes() for key, weight in load_file(file).items()}


def optimizer_of(run_dir: Path, name: str) -> str:
    """The state of the optimizer, and of the buffer, in a checkpoint, every tensor as its bytes."""
    saved = torch.load(run_dir / "checkpoints" / name / "optimizer.pt", weights_only=True)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    return repr(plain({name: value for name, value in saved.items() if name != "generators"}))


def assert_same_run(one: Path, other: Path, name: str) -> None:
    """The same metrics, samples, questions and, in checkpoint `name`, weights and optimizer, to the bit."""
    assert metrics_of(one) == metrics_of(other)
    for folder in ("rollouts", "queries", "evals"):
        assert rows_of(one, folder) == rows_of(other, folder)
    assert weights_of(one, name) == weights_of(other, name)
    assert optimizer_of(one, name) == optimizer_of(other, name)
