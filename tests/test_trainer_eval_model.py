"""`ampo eval`: the same samples as in training, kept as they arrive; it continues after a kill; engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from run_examples import PROBLEMS, config_of, settings, write_problems, write_store

from precompute.config_file import load_config
from store.errors import ConfigError, EngineError, RunError
from trainer.config import Config
from trainer.eval_model import EvalReport, evaluate_model, opened
from trainer.evaluation import EvalSample
from trainer.telemetry.console import TrainReporter
from trainer.train import train

ROOT = Path(__file__).parent.parent
HELD_OUT = PROBLEMS[:4]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evals")
    write_problems(path / "train.jsonl", PROBLEMS)
    write_problems(path / "heldout.jsonl", HELD_OUT)
    write_store(path / "traces")
    return path


def eval_config(world: Path, model: Path, **changes: Any) -> Config:
    return config_of(
        world,
        model,
        **{"problems__eval": str(world / "heldout.jsonl"), "eval__samples": 3, "eval__k": [1, 3], **changes},
    )


def evaluated(world: Path, model: Path, out: Path | None = None, **changes: Any) -> EvalReport:
    return evaluate_model(eval_config(world, model, **changes), TrainReporter(), out=out)


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = [row for part in sorted(out.glob("samples/*.parquet")) for row in pq.read_table(part).to_pylist()]
    return sorted(rows, key=lambda row: (row["problem_id"], row["sample_index"]))


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_checkpoint_is_evaluated_as_training_evaluated_it(
    world: Path, model_dir: Path, tmp_path: Path, use_peft: bool
) -> None:
    name = f"peft-{use_peft}"
    config = eval_config(
        world, model_dir, run__name=name, train__max_steps=1, eval__every=1, student__use_peft=use_peft
    )
    done = train(config, resume="never", reporter=TrainReporter())
    assert done.checkpoint is not None
    report = evaluated(world, done.checkpoint, tmp_path / "out")
    in_training = pq.read_table(done.run / "evals" / "step-000001.parquet").drop_columns("step").to_pylist()
    assert rows_of(report.out) == sorted(
        in_training, key=lambda row: (row["problem_id"], row["sample_index"])
    )
    logged = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()][-1]
    for name, value in report.evaluation.metrics.items():
        assert logged[name] == value


def test_a_finished_evaluation_is_repeated_from_its_files(
    world: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(world, model_dir)
    rows = rows_of(first.out)
    assert len(rows) == 4 * 3
    assert list(rows[0]) == [field.name for field in fields(EvalSample)]
    results = json.loads((first.out / "results.json").read_text())
    assert {key: results[key] for key in first.evaluation.metrics} == first.evaluation.metrics
    assert first.out.parent == world / "runs" / "evals"
    assert first.out.name.startswith(f"{model_dir.name}-heldout-")
    monkeypatch.setattr("trainer.eval_model.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    again = evaluated(world, model_dir)
    assert (again.out, again.evaluation) == (first.out, first.evaluation)
    monkeypatch.undo()
    other = evaluated(world, model_dir, eval__samples=1, eval__k=[1], eval__temperature=0.2)
    assert other.out.parent == first.out.parent
    assert other.out != first.out


@pytest.fixture(scope="module")
def whole(world: Path, model_dir: Path) -> EvalReport:
    """5 samples of each of 4 problems, without an interruption."""
    return evaluated(world, model_dir, world / "whole", eval__samples=5)


def test_more_samples_are_added_to_the_existing_ones(
    world: Path, model_dir: Path, tmp_path: Path, whole: EvalReport
) -> None:
    few = evaluated(world, model_dir, tmp_path / "out", eval__samples=2, eval__k=[1])
    before = {part.name for part in few.out.glob("samples/*")}
    more = evaluated(world, model_dir, tmp_path / "out", eval__samples=5)
    first, *others = sorted(more.out.glob("samples/*.parquet"))
    assert {first.name} == before
    assert sum(pq.read_metadata(part).num_rows for part in others) == 4 * 3
    assert rows_of(more.out) == rows_of(whole.out)


def test_another_recipe_in_the_same_directory_is_refused_with_the_difference(
    world: Path, model_dir: Path, tmp_path: Path
) -> None:
    few: dict[str, Any] = {"eval__samples": 1, "eval__k": [1]}
    evaluated(world, model_dir, tmp_path / "out", **few)
    changes: dict[str, Any] = {
        "eval__temperature": 0.1,
        "rollout__max_completion_length": 12,
        "train__seed": 5,
        "student__system_prompt": "Think.",
    }
    prompts = r"prompts = '4, \w+', now '4, \w+'"
    differences = rf"{prompts}; temperature = 0\.6, now 0\.1; max_tokens = 24, now 12; seed = 0, now 5"
    refusal = f"out holds an evaluation with {differences}; choose another directory"
    with pytest.raises(RunError, match=refusal):
        evaluated(world, model_dir, tmp_path / "out", **few, **changes)
    recipe = json.loads((tmp_path / "out" / "eval.json").read_text())
    with opened(tmp_path / "out", recipe), pytest.raises(RunError, match=r"another process \(pid \d+\)"):
        evaluated(world, model_dir, tmp_path / "out", **few)


def test_weights_that_have_changed_are_another_model(world: Path, model_dir: Path, tmp_path: Path) -> None:
    from conftest import tiny_model, tiny_tokenizer

    model = tmp_path / "model"
    tiny_model(seed=0).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    evaluated(world, model, tmp_path / "out")
    tiny_model(seed=1).save_pretrained(model)
    with pytest.raises(RunError, match=r"weights = '\w+', now '\w+'"):
        evaluated(world, model, tmp_path / "out")


def test_a_directory_of_something_else_is_left_alone(world: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds something other than an evaluation"):
        evaluated(world, model_dir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_interrupted_anywhere_the_same_call_ends_with_the_same_samples(
    world: Path, model_dir: Path, tmp_path: Path, whole: EvalReport
) -> None:
    class Impatient(TrainReporter):
        def sampling(self, label: str, done: int, total: int) -> None:
            if done == 7:
                raise KeyboardInterrupt

    config = eval_config(world, model_dir, eval__samples=5, rollout__batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(config, Impatient(), out=tmp_path / "cut")
    there = rows_of(tmp_path / "cut")
    assert 0 < len(there) < 20
    assert not (tmp_path / "cut" / "results.json").exists()
    done = evaluated(world, model_dir, tmp_path / "cut", eval__samples=5)
    assert rows_of(done.out) == rows_of(whole.out)
    assert done.evaluation == whole.evaluation


def test_a_killed_evaluation_continues(world: Path, model_dir: Path, tmp_path: Path) -> None:
    changes = {
        "problems__eval": str(world / "train.jsonl"),
        "eval__samples": 12,
        "eval__k": [1],
        "rollout__batch_size": 8,
    }
    command = [sys.executable, "-m", "cli", "eval", str(model_dir), "--out", str(tmp_path / "out")]
    command += [part for each in settings(world, model_dir, **changes) for part in ("--set", each)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("samples/part-*")) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert rows_of(tmp_path / "out")
    done = evaluated(world, model_dir, tmp_path / "out", **changes)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len({(row["problem_id"], row["sample_index"]) for row in rows}) == 12 * 12
    assert done.evaluation.overall.problems == 12


def test_adapters_need_merging_for_other_engines(world: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(EngineError, match=r"holds only adapters.*ampo model merge"):
        evaluated(world, tmp_path, eval__engine="vllm")


@pytest.mark.parametrize(
    ("engine_args", "said"),
    [
        ({"tensor_parallel": 2}, "unknown key tensor_parallel; known keys: dtype, batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"base_urls": ["http://key@host/v1"]}, "a URL carries no key"),
    ],
)
def test_engine_args_are_checked_and_never_shown(engine_args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(Config, None, [f"eval.engine_args={toml(engine_args)}"])
    assert "key@host" not in str(refused.value)


def toml(table: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


def test_transformers_takes_no_engine_args(world: Path, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.engine_args: the engine transformers reads student"):
        evaluated(world, model_dir, eval__engine="transformers", eval__engine_args__dtype="float32")
