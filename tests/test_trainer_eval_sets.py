"""Held-out sets by name, and what a run says about the problems that it trains on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from run_examples import PROBLEMS, config_of, make_world, write_problems

from precompute.config_file import load_config, toml_of
from precompute.run.progress import Reporter
from store.errors import ConfigError
from store.records import Problem
from trainer.config import Config, EvalConfig
from trainer.eval_model import evaluate_model
from trainer.evaluation import EvalSample, Evaluation, evaluation_of, metrics_of
from trainer.reports.tables import evaluations_table
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics
from trainer.train import train

OTHERS = [Problem(question=f"{n}-{n}", answer="0") for n in range(3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("sets"))
    write_problems(world / "others.jsonl", OTHERS)
    return world


def sets_of(world: Path) -> dict[str, Any]:
    """One set by its path, one with a column of its own: the train file's first problems."""
    rows = [{"text": problem.question, "answer": problem.answer} for problem in PROBLEMS[:2]]
    (world / "shared.jsonl").write_text("\n".join(map(json.dumps, rows)))
    others = str(world / "others.jsonl")
    return {"others": others, "shared": {"files": str(world / "shared.jsonl"), "question_column": "text"}}


def with_sets(world: Path, model_dir: Path, **changes: Any) -> Config:
    config = config_of(world, model_dir, train__max_steps=1, eval__samples=2, eval__k=[1, 2], **changes)
    tree = config.model_dump(mode="json")
    tree["eval"]["sets"] = sets_of(world)
    return Config.model_validate(tree)


def test_each_named_set_has_a_curve_of_its_own(world: Path, model_dir: Path) -> None:
    reporter = TrainReporter()
    outcome = train(with_sets(world, model_dir, eval__every=1, run__name="sets"), reporter=reporter)
    rows = [row for row in read_metrics(outcome.run) if "eval/pass@1" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert {f"eval/{name}/pass@{k}" for k in (1, 2) for name in ("others", "shared")} <= row.keys()
    samples = pq.read_table(outcome.run / "evals" / "step-000001.parquet").to_pylist()
    assert [row["set"] for row in samples] == ["others"] * 6 + ["shared"] * 4
    table = evaluations_table({"sets": read_metrics(outcome.run)})
    assert list(table.columns[1].cells) == ["others", "shared"] * 2
    (warning,) = (each for each in reporter.warnings if "too, e.g." in each)
    assert warning == "2 of 2 problems of eval.sets.shared are in problems.train, too, e.g. '0+0'"


def of_one(name: str, *, right: bool) -> Evaluation:
    """The evaluation of a set of one problem with one sample."""
    sample = EvalSample(
        problem_id="p",
        source="",
        sample_index=0,
        is_correct=right,
        has_format=True,
        n_tokens=4,
        finish_reason="stop",
        text="",
    )
    return replace(evaluation_of(EvalConfig(samples=1, k=(1,)), [sample], {"p": ""}), name=name)


def test_the_short_name_is_that_of_problems_eval_or_the_mean_of_the_sets() -> None:
    sets = [of_one("a", right=True), of_one("b", right=False), of_one("c", right=False)]
    found = metrics_of(sets)
    assert (found["eval/a/pass@1"], found["eval/b/pass@1"]) == (1.0, 0.0)
    assert found["eval/pass@1"] == pytest.approx(1 / 3)
    assert metrics_of([of_one("", right=False), *sets])["eval/pass@1"] == 0.0


def test_the_sets_survive_the_runs_config_file(world: Path, model_dir: Path, tmp_path: Path) -> None:
    config = with_sets(world, model_dir)
    (tmp_path / "config.toml").write_text(toml_of(config), encoding="utf-8")
    assert load_config(Config, str(tmp_path / "config.toml"), []) == config


def test_ampo_eval_takes_a_set_by_its_name(world: Path, model_dir: Path, tmp_path: Path) -> None:
    config = with_sets(world, model_dir, problems__eval="shared")
    evaluation, results = evaluate_model(config, Reporter(), out=tmp_path / "out")
    assert evaluation.overall.problems == 2
    assert results["problems"] == "shared"
    with pytest.raises(
        ConfigError, match=r"--problems FILE or one of others, shared, the names in eval\.sets"
    ):
        evaluate_model(with_sets(world, model_dir), Reporter())


def test_a_system_turn_of_the_data_is_replaced_with_a_line(world: Path, model_dir: Path) -> None:
    chat = [{"role": "system", "content": "You add."}]
    rows = [
        {"prompt": [*chat, {"role": "user", "content": p.question}], "answer": p.answer} for p in PROBLEMS
    ]
    (world / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reporter = TrainReporter()
    changes = {"problems__train": str(world / "chat.jsonl"), "train__max_steps": 0, "run__name": "chat"}
    train(config_of(world, model_dir, **changes), reporter=reporter)
    replaced = "student.system_prompt replaces the system turns of 12 problems; "
    assert f'{replaced}student.system_prompt = "none" keeps them' in reporter.warnings


def test_a_limit_takes_the_first_problems(world: Path, model_dir: Path) -> None:
    outcome = train(
        config_of(world, model_dir, problems__limit=4, train__max_steps=2, run__name="few"),
        reporter=TrainReporter(),
    )
    files = (outcome.run / "rollouts").glob("*.parquet")
    seen = {row["problem_id"] for file in files for row in pq.read_table(file).to_pylist()}
    assert seen == {problem.problem_id for problem in PROBLEMS[:4]}
